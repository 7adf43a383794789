"""Settings of every test: hypothesis draws the same examples each time, and a busy machine is no failure.

Tests build like things again and again, and jax would compile each of them anew, which takes longer than to run them: a
process compiles a program once, and finds it in a folder of its own from then on. Processes that tests start do not
read it: one that is killed could leave half a program there.
"""

from __future__ import annotations

import shutil
import tempfile

import jax
import pytest
from hypothesis import settings

settings.register_profile("elk_stress", deadline=None, derandomize=True)
settings.load_profile("elk_stress")

_PROGRAMS = tempfile.mkdtemp(prefix="elk-stress-programs-")
jax.config.update("jax_compilation_cache_dir", _PROGRAMS)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_PROGRAMS, ignore_errors=True)
