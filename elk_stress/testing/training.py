r"""What every attack that moves weights must hold to: the public suite, on a trainee of the caller's.

The engine believes an attack nothing but this: that it starts at the original weights, that strength 0 does not look at
the probe, and that a state gives the same continuation whenever it is resumed,

``advance(a + b) = advance(b) after advance(a)``, bit for bit, also through a file.

Each promise is one named check. They share their runs: a short one of ``2 + 2`` steps, and for ``engages`` as many as
the attack's own ``steps``, so give it a size that is a matter of seconds on this trainee.

Shapes: cells are two strengths, 0 and a strong one, times the trainee's models.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from elk_stress.testing.shared import Checks, run_checks
from elk_stress.training.checkpoint import Checkpoints
from elk_stress.training.evasion import targets_from
from elk_stress.training.protocols import Log, State, Targets, Trainee, TrainingAttack

__all__ = ["check_training_attack", "checks_for_training_attack"]

_HALF = 2  # steps of either part of the short run
_FALL = 0.1  # by less, the engine says that an attack did not engage


def check_training_attack(
    attack: TrainingAttack, trainee: Trainee, *, strength: float = 10.0, seed: int = 0
) -> list[str]:
    """Run every check that applies to ``attack`` on ``trainee`` and return their names.

    Args:
        attack: made with hyperparameters under which it engages within its own ``steps``.
        trainee: of the subject that the attack trains; its training items must be readable.
        strength: a strong one.
        seed: of all runs.

    Raises:
        AssertionError: the first check that fails, by name.
    """
    checks = checks_for_training_attack(attack, trainee, strength=strength, seed=seed)
    return run_checks(f"attack {attack.name!r}", checks)


def checks_for_training_attack(
    attack: TrainingAttack, trainee: Trainee, *, strength: float = 10.0, seed: int = 0
) -> Checks:
    """The checks that apply to ``attack``, by name; arguments as in :func:`check_training_attack`."""
    strengths = np.array([0.0, strength], dtype=np.float32)
    cells = (len(strengths), trainee.n_models)

    @functools.cache
    def targets() -> Targets:
        return _targets(trainee, len(strengths), seed)

    def start(with_seed: int = seed) -> State:
        return attack.start(trainee, strengths, with_seed)

    def advance(state: State, steps: int, against: Targets | None = None) -> tuple[State, Log]:
        return attack.advance(trainee, state, targets() if against is None else against, steps)

    def weights(state: State) -> np.ndarray:
        return np.asarray(attack.weights(trainee, state))

    @functools.cache
    def short() -> tuple[State, Log]:
        return advance(start(), 2 * _HALF)

    def declarations() -> None:
        assert dataclasses.is_dataclass(attack), "an attack is a frozen dataclass of hyperparameters"
        assert type(attack).__dataclass_params__.frozen, "the dataclass must be frozen"
        assert isinstance(attack, TrainingAttack), "it lacks a part of the TrainingAttack protocol"
        assert attack.scopes == ("weights",), (
            f"an attack that moves weights has scopes ('weights',), got {attack.scopes}"
        )
        assert attack.access in ("none", "score", "weights"), f"access {attack.access!r} is none, score or weights"
        assert attack.subject == trainee.subject, (
            f"it trains a {attack.subject}, and this trainee is a {trainee.subject}"
        )
        assert attack.steps >= 1, f"steps is the default number of steps of a run, got {attack.steps}"
        assert (type(attack).__doc__ or "").strip(), "it needs a docstring: its first line is its description"

    def starts_at_the_original() -> None:
        found = weights(start())
        assert found.shape == (*cells, trainee.original.shape[1]), (
            f"weights have shape {found.shape}; cells are {cells}"
        )
        assert found.dtype == np.float32, f"weights are {found.dtype}, expected float32"
        assert (found == trainee.original).all(), "before the first step some cell is not at the original weights"

    def benign_ignores_the_probe() -> None:
        expected = weights(short()[0])[0]
        for what, other in {"turned round": _turned(targets()), "not a number": _spoilt(targets())}.items():
            found = weights(advance(start(), 2 * _HALF, other)[0])[0]
            assert np.array_equal(found, expected), f"strength 0 went elsewhere when the probe was {what}: it looked"

    def deterministic() -> None:
        state = repr(np.random.get_state())  # noqa: NPY002
        _same(advance(start(), 2 * _HALF)[0], short()[0], "two runs from one seed")
        assert repr(np.random.get_state()) == state, "it used numpy's global random state"  # noqa: NPY002
        other = weights(advance(start(seed + 1), 2 * _HALF)[0])
        assert not np.array_equal(other[0], weights(short()[0])[0]), "the seed changes nothing"

    def resumes() -> None:
        first, early = advance(start(), _HALF)
        for name, value in _leaves(first):
            assert np.asarray(value).dtype != object, f"no file can hold {name!r} of a state: it is no array of numbers"
        with tempfile.TemporaryDirectory() as folder:
            Checkpoints(Path(folder), {}).add({}, first)
            _, read = Checkpoints(Path(folder), {}).resume()
        _same(read, first, "a state and what was read back from its file")
        second, late = advance(read, _HALF)
        _same(second, short()[0], f"{_HALF} + {_HALF} and {2 * _HALF} steps")
        for name, rows in short()[1].items():
            parts = np.concatenate([early[name], late[name]])
            assert np.array_equal(parts, rows, equal_nan=True), f"the log {name!r} of a resumed run is another"

    def pure() -> None:
        given = start()
        kept, probe = copy.deepcopy(given), copy.deepcopy(targets().arrays)
        original = trainee.original.copy()
        advance(given, _HALF)
        _same(given, kept, "a state before and after it was advanced")
        for before, after in zip(probe, targets().arrays, strict=True):
            _same(dict(after), dict(before), "the targets before and after")
        assert np.array_equal(trainee.original, original), "it changed the trainee's original weights"

    def engages() -> None:
        state, rows = start(), []
        for _ in range(-(-attack.steps // (2 * _HALF))):
            state, log = advance(state, 2 * _HALF)
            rows.append(np.asarray(log["evasion"]))
        evasion = np.concatenate(rows)
        assert np.isfinite(evasion).all(), "the evasion loss is not finite; a smaller learning rate?"
        assert not (weights(state) == trainee.original).all(axis=-1).any(), "some cell never moved"
        begin, late = evasion[0, 1].mean(), evasion[-2 * _HALF :].mean(axis=(0, 2))
        least = _FALL
        if attack.spent(trainee, state) is not None:
            # how far a choice among few gets is chance; that it never gets worse is not
            least = 0.0
            assert (np.diff(evasion[:, 1], axis=0) <= 0).all(), "the best candidate so far got worse with more of them"
        text = f"under strength {strength:g} evasion went from {begin:.3f} to {late[1]:.3f}"
        assert late[1] < (1 - least) * begin, text
        assert late[1] < late[0], f"evasion ends at {late[1]:.3f} and at {late[0]:.3f} without any pressure"

    def log_shapes() -> None:
        state, log = advance(start(), _HALF)
        for name in ("task", "evasion"):
            assert name in log, f"the log lacks {name!r}; it has {', '.join(log)}"
        for name in log:
            # two lengths: one might by chance be the number of strengths or models
            for steps, rows in ((_HALF, log[name]), (2 * _HALF, short()[1][name])):
                expected = (steps, *cells)
                assert np.shape(rows) == expected, f"{steps} steps log {name!r} of {np.shape(rows)}, not {expected}"
        assert np.isfinite(log["evasion"]).all(), "the evasion of a short run is not finite"
        assert weights(state).shape == (*cells, trainee.original.shape[1]), "weights changed their shape"
        nothing, empty = advance(state, 0)
        _same(nothing, state, "a state and the same after 0 steps")
        assert all(np.shape(rows) == (0, *cells) for rows in empty.values()), "0 steps must log 0 rows"

    def spent() -> None:
        state = start()
        for taken in (0, _HALF, 2 * _HALF):
            if taken:
                state, _ = advance(state, _HALF)
            bits = attack.spent(trainee, state)
            if bits is None:
                continue
            assert np.shape(bits) == cells, f"spent has shape {np.shape(bits)}; cells are {cells}"
            assert (bits[0] == 0).all(), f"the benign control chose nothing and claims {np.max(bits[0])} bits"
            expected = np.log2(max(taken, 1))
            assert (bits[1] == expected).all(), f"after {taken} candidates it spent {bits[1]}, not {expected} bits"

    def does_not_recompile() -> None:
        state, _ = advance(start(), 2 * _HALF)
        with _compilations() as compiled:
            advance(state, 2 * _HALF)
        assert not compiled, f"a second call of as many steps compiled anew: {compiled[0]}"

    checks: Checks = {
        "declarations": declarations,
        "starts_at_the_original": starts_at_the_original,
        "benign_ignores_the_probe": benign_ignores_the_probe,
        "deterministic": deterministic,
        "resumes": resumes,
        "pure": pure,
        "engages": engages,
        "log_shapes": log_shapes,
        "spent": spent,
    }
    if attack.subject == "organism":
        checks["does_not_recompile"] = does_not_recompile
    return checks


def _targets(trainee: Trainee, n_strengths: int, seed: int) -> Targets:
    """A probe fitted to the original weights in every cell."""
    activations = trainee.activations(np.repeat(trainee.original[None], n_strengths, axis=0), "train")
    # here: the suite is imported by everybody who checks a probe, and this loads scipy
    from elk_stress.training.measure import fit_cells

    probes = fit_cells(trainee, "logistic", activations, seed)
    return targets_from([probes], activations, trainee.splits["train"].labels)


def _changed(targets: Targets, change: Callable[[str, np.ndarray], np.ndarray]) -> Targets:
    """Targets with every array changed; name and array -> array of the same shape."""

    def every(arrays: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        return {
            name: every(value, f"{name}/") if isinstance(value, Mapping) else change(prefix + name, np.asarray(value))
            for name, value in arrays.items()
        }

    return dataclasses.replace(targets, arrays=tuple(every(a) for a in targets.arrays))


def _turned(targets: Targets) -> Targets:
    """Other probes: negated, louder, with another gap."""
    return _changed(targets, lambda name, value: -7 * value if name.startswith("parameters/") else 3 * value)


def _spoilt(targets: Targets) -> Targets:
    """What not even ``0 *`` makes harmless."""
    return _changed(targets, lambda name, value: np.full_like(value, np.nan if name.startswith("param") else np.inf))


def _same(one: Any, other: Any, what: str) -> None:
    """Two states are equal bit for bit: the same names, types, shapes and numbers (NaN equals NaN)."""
    first, second = dict(_leaves(one)), dict(_leaves(other))
    assert first.keys() == second.keys(), f"{what} differ: they hold {', '.join(first)} and {', '.join(second)}"
    for name, value in first.items():
        a, b = np.asarray(value), np.asarray(second[name])
        assert a.dtype == b.dtype != object, f"{what} differ: {name!r} is {a.dtype} and {b.dtype}"
        assert a.shape == b.shape, f"{what} differ: {name!r} has shapes {a.shape} and {b.shape}"
        assert a.tobytes() == b.tobytes(), f"{what} differ in {name!r}"


def _leaves(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    assert isinstance(state, Mapping), f"a state is a dictionary of numpy arrays, got {type(state).__name__}"
    # by name: a state that was read from a file comes in whatever order the file had
    for name, value in sorted(state.items()):
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


@contextmanager
def _compilations() -> Iterator[list[str]]:
    """What jax compiles inside; its log goes nowhere else meanwhile."""
    import jax

    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Compiling"):
                found.append(record.getMessage())

    logger = logging.getLogger("jax")
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [Collect()], False
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.handlers, logger.propagate = handlers, propagate
