"""What the attacks that tests make up declare, unless they say otherwise."""

from __future__ import annotations

from typing import Any, ClassVar


class Stub:
    """Per item, under any prior, knowing its own mind and asking the probe nothing."""

    name: ClassVar[Any] = "stub"
    access: ClassVar[Any] = "none"
    scopes: ClassVar[Any] = ("item",)
    needs: ClassVar[Any] = ("model_access",)
    priors: ClassVar[Any] = ()
