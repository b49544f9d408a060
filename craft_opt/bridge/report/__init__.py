"""The retention benchmark: methods, seeds and anchor budgets over sequences of skills, and the report on them."""
