"""The suite of a testbed: splits that do not leak, activations that can be read twice, a truth, and a shift.

See :func:`checks_for_testbed`.
"""

from __future__ import annotations

import itertools
import json

import numpy as np

from elk_stress.probe import FittedProbe, as_fitted
from elk_stress.testbed import ContextSet, Testbed, check_splits
from elk_stress.testing.shared import Checks, auroc, run_checks

__all__ = ["check_testbed", "checks_for_testbed"]


def check_testbed(testbed: Testbed, *, n_items: int = 6, seed: int = 0) -> list[str]:
    """Run every check on ``testbed`` (prepared first) and return their names; ``n_items`` are moved for each.

    Raises:
        AssertionError: the first check that fails, by name.
    """
    return run_checks(f"testbed {testbed.name!r}", checks_for_testbed(testbed, n_items=n_items, seed=seed))


def checks_for_testbed(testbed: Testbed, *, n_items: int = 6, seed: int = 0) -> Checks:
    """The checks of a testbed, by name. Each prepares it first, which is cheap after the first time."""
    names = ("train", "calibration", "test")

    def moves(rows: np.ndarray, count: int) -> np.ndarray:
        """Natural moves ``(items, count, dim)``: from an item's mean to itself under one context."""
        prior = testbed.activations("test", "prior")[rows].astype(float)
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        chosen = rng.choice(prior.shape[1], count, replace=count > prior.shape[1])
        return np.asarray((prior - prior.mean(axis=1, keepdims=True))[:, chosen])

    def some_items() -> np.ndarray:
        size = len(testbed.splits["test"])
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        return np.sort(rng.choice(size, min(n_items, size), replace=False))

    def declarations() -> None:
        testbed.prepare()
        assert isinstance(testbed, Testbed), "it lacks a part of the Testbed protocol"
        assert set(testbed.splits) == set(names), f"splits are {sorted(testbed.splits)}, not {', '.join(names)}"
        assert testbed.site, "it must say where activations are read"
        assert testbed.shift_cost in ("exact", "model"), f"shift_cost is {testbed.shift_cost!r}"
        json.dumps(testbed.describe())

    def grouping() -> None:
        testbed.prepare()
        leaked = check_splits(testbed.splits)
        assert not leaked, f"{len(leaked)} entities occur in more than one split, e.g. {leaked[:3]}"
        seen = [name for items in testbed.splits.values() for name in items.ids]
        assert len(seen) == len(set(seen)), "item ids are not unique"

    def items() -> None:
        testbed.prepare()
        for name, part in testbed.splits.items():
            assert part.labels.shape == part.groups.shape == (len(part),), f"{name}: labels or groups do not fit"
            assert set(np.unique(part.labels).tolist()) == {0, 1}, f"{name}: labels must hold both 0 and 1"
            assert part.texts is None or len(part.texts) == len(part), f"{name}: one text per item"
            if part.pairs is not None:
                one, other = part.pairs[:, 0], part.pairs[:, 1]
                assert part.pairs.min() >= 0, f"{name}: pairs point before the first item"
                assert part.pairs.max() < len(part), f"{name}: pairs point past the last item"
                assert (part.labels[one] + part.labels[other] == 1).all(), f"{name}: a pair must have one positive"
                assert (part.groups[one] == part.groups[other]).all(), f"{name}: a pair crosses entities"

    def activations() -> None:
        testbed.prepare()
        for name, part in testbed.splits.items():
            kinds: tuple[ContextSet, ...] = ("prior", "observed", "bare")
            contexts = {kind: testbed.activations(name, kind) for kind in kinds}
            for kind, array in contexts.items():
                good = array.ndim == 3 and len(array) == len(part) and array.shape[2] == testbed.dim
                assert good, f"{name}/{kind}: shape {array.shape}, expected ({len(part)}, contexts, {testbed.dim})"
                assert array.dtype == np.float32, f"{name}/{kind}: {array.dtype}, expected float32"
                assert np.isfinite(array).all(), f"{name}/{kind}: NaN or inf"
                assert np.ptp(array, axis=0).max() > 0, f"{name}/{kind}: the same for every item"
            assert contexts["prior"].shape[1] >= 2, f"{name}: a prior needs at least two contexts"
            assert contexts["bare"].shape[1] == 1, f"{name}: the bare item is one context"
            again = testbed.activations(name, "prior")
            assert np.array_equal(contexts["prior"], again), f"{name}: reading twice gives other activations"

    def truth_is_there() -> None:
        testbed.prepare()
        train, test = testbed.activations("train", "prior"), testbed.activations("test", "prior")
        labels = np.repeat(testbed.splits["train"].labels, train.shape[1])
        fitted = as_fitted("logistic", train.reshape(-1, testbed.dim), labels)
        value = auroc(fitted.score(test).mean(axis=1), testbed.splits["test"].labels)
        assert value >= 0.65, f"held-out AUROC of logistic regression is {value:.3f}: there is nothing to probe for"

    def shift_at_zero() -> None:
        testbed.prepare()
        rows = some_items()
        shift = testbed.shift("test", rows, np.zeros((len(rows), 2, testbed.dim)))
        assert shift.shape == (len(rows), 2), f"shift has shape {shift.shape}, expected ({len(rows)}, 2)"
        assert np.abs(shift).max() < 1e-4, f"the unmoved item shifts by {np.abs(shift).max():.1e} nats, not 0"

    def shift_grows() -> None:
        testbed.prepare()
        rows = some_items()
        natural = moves(rows, 2)
        medians = [float(np.median(testbed.shift("test", rows, scale * natural))) for scale in (0.25, 0.5, 1.0, 2.0)]
        assert np.isfinite(medians).all(), "a shift is not finite"
        assert all(a < b for a, b in itertools.pairwise(medians)), (
            f"the median shift of moves 0.25, 0.5, 1 and 2 times a natural one is {medians}; it must grow"
        )
        again = float(np.median(testbed.shift("test", rows, 2.0 * natural)))
        assert again == medians[-1], "shift is not deterministic"

    def factor_agrees() -> None:
        testbed.prepare()
        rows = some_items()
        factor = np.asarray(testbed.shift_factor("test", rows), dtype=float)
        good = factor.ndim == 3 and factor.shape[0] == len(rows) and factor.shape[2] == testbed.dim
        assert good, f"shift_factor has shape {factor.shape}, expected ({len(rows)}, rank, {testbed.dim})"
        natural = moves(rows, 2)
        predicted = 0.5 * (np.einsum("prd,pnd->pnr", factor, natural) ** 2).sum(axis=-1)
        assert (predicted > 0).all(), "the factor says that a natural move does not shift behaviour at all"
        # scaled to a predicted hundredth of a nat: small enough for the quadratic form, above float32's rounding
        small = natural * np.sqrt(0.01 / predicted)[..., None]
        ratio = testbed.shift("test", rows, small) / 0.01
        middle = float(np.median(ratio))
        assert 0.6 < middle < 1.6, f"the true shift of small moves is {middle:.2f} times the factor's; expected about 1"

    def known_probes() -> None:
        testbed.prepare()
        bare = testbed.activations("test", "bare")[:, 0]
        for name, probe in testbed.known_probes().items():
            assert isinstance(probe, FittedProbe), f"known probe {name!r} is {type(probe).__name__}, not a FittedProbe"
            assert np.isfinite(probe.score(bare)).all(), f"known probe {name!r} does not score the testbed"

    return {
        "declarations": declarations,
        "grouping": grouping,
        "items": items,
        "activations": activations,
        "truth_is_there": truth_is_there,
        "shift_at_zero": shift_at_zero,
        "shift_grows": shift_grows,
        "factor_agrees": factor_agrees,
        "known_probes": known_probes,
    }
