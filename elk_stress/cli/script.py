"""Attack files as scripts: ``python attacks/gradient.py ...`` is ``elk-stress run --attacks gradient ...``.

One that moves weights, ``python attacks/finetune.py ...``, is ``elk-stress train --attack finetune ...``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["run_attack", "run_training_attack"]


def run_attack(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command line with one attack chosen; ``arguments`` default to those of the process. Returns the exit
    code. The attack is looked up by name, so that the run uses the registered class and not the script's copy."""
    from elk_stress.cli import main

    given = list(sys.argv[1:] if arguments is None else arguments)
    return int(main(["run", "--attacks", name, *given]) or 0)


def run_training_attack(name: str, arguments: Sequence[str] | None = None) -> int:
    """Like :func:`run_attack` for an attack that moves weights: ``elk-stress train --attack NAME ...``."""
    from elk_stress.cli import main

    given = list(sys.argv[1:] if arguments is None else arguments)
    return int(main(["train", "--attack", name, *given]) or 0)
