"""Settings of every test: hypothesis draws the same examples each time, and a busy machine is no failure."""

from hypothesis import settings

settings.register_profile("elk_stress", deadline=None, derandomize=True)
settings.load_profile("elk_stress")
