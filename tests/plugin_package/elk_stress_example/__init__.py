"""A third party's probe and attack."""
