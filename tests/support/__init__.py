"""What the tests of every room share: samplers, named assertions and the one table of tolerances."""
