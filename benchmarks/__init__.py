"""Speed and memory of the optimizer step, measured against everything that does the same work."""
