"""The suite of a testbed: splits that do not leak, activations that can be read again, a truth, and a shift.

=============================  =========================================================================================
declarations                   the protocol, three splits, a JSON description; ``tokens``, if any, divide ``dim``
grouping, items                no entity in two splits, unique ids; labels, groups, texts and pairs fit
activations                    float32 ``(items, contexts, dim)``, finite, not constant; reading again gives the same;
                               no context is in two sets
truth_is_there                 positive control: logistic regression on training items reads it from held-out ones
known_probes                   they score the testbed, all reads or the last of each item
no_hidden_state                reading and shifting leaves the global random states alone
=============================  =========================================================================================

Only where behaviour has an output (``shift_cost`` is not ``none``):

=============================  =========================================================================================
shift_at_zero, shift_grows     0 for the unmoved item, more for longer moves, never negative
shift_of_any_batch             the same for an item and a move in any order and among any others (drawn by hypothesis)
factor_agrees                  ``0.5 ||F move||^2`` for small moves; for any move where ``shift_cost`` is ``exact``
=============================  =========================================================================================
"""

from __future__ import annotations

import itertools
import json

import numpy as np

from elk_stress.probing.multi_read import flatten, tokens_of
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.testbeds.protocol import ContextSet, Testbed, check_splits
from elk_stress.testing.shared import Checks, auroc, no_global_randomness, run_checks, settings

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
        assert testbed.shift_cost in ("exact", "model", "none"), f"shift_cost is {testbed.shift_cost!r}"
        tokens = tokens_of(testbed)
        assert tokens is None or (tokens >= 1 and testbed.dim % tokens == 0), (
            f"it says that its {testbed.dim} coordinates are {tokens} reads of equal width; they cannot be"
        )
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
            if again.flags.writeable:
                before, again[0, 0, 0] = again[0, 0, 0], 1e9
                kept = testbed.activations(name, "prior")[0, 0, 0] == before
                assert kept, f"{name}: who writes into activations changes the testbed's own; mark them read-only"
                again[0, 0, 0] = before
            if name == "train":
                fit = testbed.activations(name, "fit")
                assert not _shares_a_context(fit, again), "fit and prior share a context"
            assert not _shares_a_context(again, contexts["observed"]), f"{name}: prior and observed share a context"

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
        assert (testbed.shift("test", rows, natural) >= -1e-6).all(), "a shift is negative, and a KL cannot be"
        medians = [float(np.median(testbed.shift("test", rows, scale * natural))) for scale in (0.25, 0.5, 1.0, 2.0)]
        assert np.isfinite(medians).all(), "a shift is not finite"
        assert all(a < b for a, b in itertools.pairwise(medians)), (
            f"the median shift of moves 0.25, 0.5, 1 and 2 times a natural one is {medians}; it must grow"
        )
        again = float(np.median(testbed.shift("test", rows, 2.0 * natural)))
        assert again == medians[-1], "shift is not deterministic"

    def shift_of_any_batch() -> None:
        from hypothesis import given
        from hypothesis import strategies as st

        testbed.prepare()
        rows = some_items()
        natural = moves(rows, 3)
        full = testbed.shift("test", rows, natural)

        @settings(3)
        @given(order=st.permutations(range(len(rows))), others=st.permutations(range(3)))
        def holds(order: list[int], others: list[int]) -> None:
            found = testbed.shift("test", rows[order], natural[order][:, others])
            agrees(found, full[order][:, others])

        def agrees(found: np.ndarray, expected: np.ndarray) -> None:
            gap = np.abs(found - expected).max()
            # float32 sums in another order
            assert gap <= 1e-3 * (1e-3 + np.abs(full).max()), (
                f"an item's shift changes by {gap:.1e} nats with the items and moves beside it"
            )

        agrees(testbed.shift("test", rows[:1], natural[:1, :1]), full[:1, :1])
        with no_global_randomness("it"):
            holds()

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
        if testbed.shift_cost == "exact":
            gap = float(np.abs(testbed.shift("test", rows, natural) / predicted - 1).max())
            assert gap < 1e-3, f"it declares its shift to be exactly 0.5 ||F move||^2, and {gap:.1e} of it is not"
        assert 0.6 < middle < 1.6, f"the true shift of small moves is {middle:.2f} times the factor's; expected about 1"

    def known_probes() -> None:
        testbed.prepare()
        bare = testbed.activations("test", "bare")[:, 0]
        for name, probe in testbed.known_probes().items():
            assert isinstance(probe, FittedProbe), f"known probe {name!r} is {type(probe).__name__}, not a FittedProbe"
            tokens = tokens_of(testbed)
            laid_out = flatten(probe, tokens) if tokens and probe.dim == testbed.dim // tokens else probe
            assert np.isfinite(laid_out.score(bare)).all(), f"known probe {name!r} does not score the testbed"

    def no_hidden_state() -> None:
        testbed.prepare()
        with no_global_randomness("it"):
            testbed.prepare()
            testbed.activations("train", "prior")
            testbed.describe()

    checks: Checks = {
        "declarations": declarations,
        "grouping": grouping,
        "items": items,
        "activations": activations,
        "truth_is_there": truth_is_there,
        "known_probes": known_probes,
        "no_hidden_state": no_hidden_state,
    }
    if testbed.shift_cost != "none":
        checks |= {
            "shift_at_zero": shift_at_zero,
            "shift_grows": shift_grows,
            "shift_of_any_batch": shift_of_any_batch,
            "factor_agrees": factor_agrees,
        }
    return checks


def _shares_a_context(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether some context of one set reads every item as some context of the other does."""
    return any(np.array_equal(one[:, i], other[:, j]) for i in range(one.shape[1]) for j in range(other.shape[1]))
