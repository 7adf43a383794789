r"""A score is a function of its row alone: whether it is, found out by asking again.

A score that changes from call to call (noise, dropout, a counter, statistics that run on), or with the rows beside it
(centred, ranked or normalized over the batch), has no bits: its threshold, its moves and its margins belong to
different functions. :func:`check_rows` scores the same n rows twice, in reversed order, in two halves, doubled, one by
one, and at last once more as at first.

What rounding may do is allowed, and nothing else. With ``eps = 2^-23`` (float32), s the scores and ``spread`` their
standard deviation over the rows:

* the same call again is the same sum in the same order, but for threads that add up in the order in which they finish::

      |s' - s| <= 256 eps spread + 4 eps |s|

* another shape of batch adds up in another order. That is worth what rounding the inputs is: with the rows changed by
  a relative ``h = 64 eps``, each number up or down at random and all of them together, by how much the score changes
  is the row's own measure::

      |s' - s| <= 256 eps (|s(x (1 +- h)) - s(x)| / h + spread + |s|)

256 is the square root of 65,536: a sum of n terms loses about ``sqrt(n)`` roundings. Noise of 1/10,000 of the spread
is thus found. A step in the score that one row happens to stand on does not count: it takes two rows to differ. What
rounding explains is refused only where it reaches a given share of the spread: such a score is made of its rounding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

__all__ = ["FLOAT32", "check_rows", "known_scores", "quiet"]

FLOAT32 = 2.0**-23
_ROUNDINGS = 256
# rows that are scored one by one
_ALONE = 6


def check_rows(
    score: Callable[[np.ndarray], Any],
    rows: np.ndarray,
    name: str,
    *,
    resolution: float = FLOAT32,
    coarsest: float = math.inf,
) -> np.ndarray:
    """Refuse a score that is random, or that depends on more than its row; returns the scores of ``rows (n, d)``.

    Args:
        score: ``(n, d) -> (n,)``; called 17 times.
        rows: at least two, of the kind that will be scored.
        name: of the probe, for the message.
        resolution: relative error of one rounding where batches of different shapes are compared.
        coarsest: share of the scores' standard deviation that rounding may take.

    Raises:
        ValueError: it cannot score them, is random, depends on the batch, or is lost in rounding; says by how much, and
            the way out.
    """
    n = len(rows)

    def scored(x: np.ndarray) -> np.ndarray:
        try:
            with quiet():
                found = np.asarray(score(np.array(x)), dtype=float)
        except Exception as error:  # whatever somebody's code raises
            alone = (
                f"scores {n} rows, but not {len(x)} of them in a batch alone" if len(x) != n else "does not score rows"
            )
            raise ValueError(
                f"the probe {name!r} {alone}: {type(error).__name__}: {str(error)[:300]}. A probe maps any number of "
                f"real rows (n, {rows.shape[1]}) to scores (n,), each by itself; is a layer left in training mode?"
            ) from error
        if found.shape != (len(x),):
            raise ValueError(f"the probe {name!r} gives scores {found.shape} for {len(x)} rows; expected ({len(x)},)")
        return found

    first = scored(rows)
    finite = first[np.isfinite(first)]
    spread = float(finite.std()) if len(finite) else 0.0

    def random(a: np.ndarray, b: np.ndarray, what: str) -> None:
        allowed = FLOAT32 * (_ROUNDINGS * spread + 4 * _size(b))
        if _apart(a, b, allowed).any():
            raise ValueError(
                f"the probe {name!r} is random: {what} scored twice differ by up to {_largest(a, b)}, where scores "
                f"have a standard deviation of {spread:.3g}. Bits of a score that changes by itself mean nothing: put "
                "the module in eval mode, take out the noise or whatever it counts or keeps from call to call, or set "
                "the seed inside the function"
            )

    random(scored(rows), first, "the same rows")
    signs = np.random.default_rng(np.random.SeedSequence([0x20E5])).choice([-1.0, 1.0], rows.shape)
    step = 64 * resolution
    slope = np.zeros(n)
    # apart for sums whose terms cancel, together for those whose terms add up
    for sign in (signs, -signs, np.ones(rows.shape), -np.ones(rows.shape)):
        with np.errstate(all="ignore"):
            change = np.abs(scored(rows * (1 + step * sign).astype(rows.dtype)) - first) / step
        slope = np.fmax(slope, np.where(np.isfinite(change), change, 0.0))
    allowed = _ROUNDINGS * resolution * (slope + spread + _size(first))
    alone = np.unique(np.linspace(0, n - 1, min(n, _ALONE)).astype(int))
    half = max(1, n // 2)
    ways: dict[str, tuple[np.ndarray, Callable[[], np.ndarray]]] = {
        "alone": (alone, lambda: np.concatenate([scored(rows[i : i + 1]) for i in alone])),
        "in another order": (np.arange(n), lambda: scored(rows[::-1])[::-1]),
        "in two halves": (np.arange(n), lambda: np.concatenate([scored(rows[:half]), scored(rows[half:])])),
        "in a batch twice as large": (np.arange(n), lambda: scored(np.concatenate([rows, rows]))[:n]),
    }
    rounded = 0.0
    for way, (which, call) in ways.items():
        found = call()
        if _apart(found, first[which], allowed[which]).sum() > 1:
            random(call(), found, f"the same rows {way}")
            raise ValueError(
                f"the probe {name!r} scores a row by the other rows of its batch: the same rows {way} get scores that "
                f"differ by up to {_largest(found, first[which])}, where scores have a standard deviation of "
                f"{spread:.3g}. A probe must score each row alone: take means, scales and ranks from training data "
                "(a module in eval mode with running statistics, a fitted scaler) instead of the batch"
            )
        known = np.sort(np.abs(found - first[which])[np.isfinite(found) & np.isfinite(first[which])])
        rounded = max(rounded, float(known[-2]) if len(known) > 1 else 0.0)
    if rounded > coarsest * spread:
        raise ValueError(
            f"the probe {name!r} scores by rounding errors: the same rows in other batches get scores that differ by "
            f"{rounded:.3g}, where scores have a standard deviation of {spread:.3g}, and its arithmetic explains it. "
            "Let it compute in double precision, or on activations from which their mean was taken off"
        )
    random(scored(rows), first, "the same rows")
    return first


def known_scores(probe: Any, activations: np.ndarray, which: str) -> np.ndarray:
    """A fitted probe's scores in float64, all of which must be numbers.

    Args:
        probe: a fitted probe.
        activations: ``(*batch, d)``.
        which: the activations in words, for the message: "unmoved activations", say.

    Raises:
        ValueError: NaN or inf among them; names the probe.
    """
    scores = np.asarray(probe.score(activations), dtype=float)
    lost = int((~np.isfinite(scores)).sum())
    if lost:
        raise ValueError(
            f"the probe {probe.name!r} scores NaN or inf on {lost} of {scores.size} {which}. A probe must "
            "score whatever a model may think: bound what a logarithm, a root or a quotient in it gets, or leave it out"
        )
    return scores


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: rows that somebody's object is only tried on are no reason for any."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _apart(a: np.ndarray, b: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        near = np.abs(a - b) <= allowed
    return np.asarray(~(near | (a == b) | (np.isnan(a) & np.isnan(b))))


def _size(scores: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(scores), np.abs(scores), 0.0)


def _largest(a: np.ndarray, b: np.ndarray) -> str:
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b)
    known = difference[np.isfinite(difference)]
    lost = int((np.isnan(a) != np.isnan(b)).sum())
    return f"{known.max(initial=0.0):.3g}" + (f" ({lost} are NaN one of the two times)" if lost else "")
