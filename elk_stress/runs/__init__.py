"""A run on disk: several probes, one folder, resumed after a kill."""
