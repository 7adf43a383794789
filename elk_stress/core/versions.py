"""Versions of everything that a number depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["versions"]

_PACKAGES = (
    "elk-stress",
    "numpy",
    "scipy",
    "scikit-learn",
    "torch",
    "jax",
    "transformers",
    "gguf",
)


def versions() -> dict[str, str]:
    """Package name -> installed version, with Python's own; nothing is imported."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
