"""Training pressure: the weights move against a probe."""
