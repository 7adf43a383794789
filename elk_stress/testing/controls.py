r"""Controls: what a probe that learns must find, and what no probe may.

**Positive control.** Classes eight noise standard deviations apart: held-out AUROC above 0.95; with swapped labels
below 0.05, for a higher score means more strongly positive. That is where a detector of one class only stands as well:
fitted on positives as its negatives, it finds the other class odd.

**Negative control.** One random labelling serves rows for training and, after these have been permuted, held-out rows.
Before that the probe is fitted on these very held-out rows with their labels. The permutation is independent of all
that a fit on the training rows is given, so a score that depends on these alone (and on no position in the batch, and
on nothing remembered) has, given all its values, exactly the Mann-Whitney null distribution:

    P[AUROC >= a] with mean 1/2 and variance (n + 1) / (12 n1 n0), less where scores are tied.

Both tails count, half of ``FALSE_ALARM`` each: who subtracts what it remembers is as wrong as who adds it. And the fit
on the training rows, made before and after that on the held-out rows, must be the same bit for bit.

It holds for every probe: an unsupervised one learns a true direction and, from shuffled labels, a sign; a detector
learns from a random half of both classes; neither knows the permutation. Contrast pairs stay pairs (one of the two is
positive). It is one test per probe: a correct one fails with chance ``FALSE_ALARM`` over the draw of labelling and
permutation, which the seed fixes; any of 50 correct ones with 0.5%. What fails is a probe that remembers rows or labels
of earlier fits, or that answers by position. (One that only overfits is not at fault: its held-out score is chance.)
"""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import numpy as np

from elk_stress.testing.case import Case, score, take
from elk_stress.testing.fits import same_parameters
from elk_stress.testing.shared import auroc

__all__ = ["FALSE_ALARM", "chance", "does_not_learn", "knows_no_more_than_it_was_told", "learns"]

FALSE_ALARM = 1e-4
_LEARNED = 0.95


def learns(case: Case) -> None:
    """The positive control."""
    held_out = case.held_out
    value = auroc(score(case.fitted, held_out.activations, held_out.mask), held_out.labels)
    assert value > _LEARNED, f"held-out AUROC {value:.3f} on classes 8 noise sd apart; learns=True promises above 0.95"
    value = auroc(score(case.swapped, held_out.activations, held_out.mask), held_out.labels)
    assert value < 1 - _LEARNED, (
        f"with swapped labels the AUROC is {value:.3f}; expected below 0.05: higher must mean more strongly positive"
    )


def does_not_learn(case: Case) -> None:
    """A control that declares learns=False ignores the labels, and over seeds it knows nothing."""
    held_out = case.held_out
    upright, swapped = (score(fitted, held_out.activations, held_out.mask) for fitted in (case.fitted, case.swapped))
    assert np.array_equal(upright, swapped), "it declares learns=False but its scores depend on the labels"
    # 64 seeds, each AUROC as likely above 1/2 as below: a mean off by 0.26 has a chance below 4e-4 (Hoeffding)
    fits = [case.data.fit(case.probe, seed=seed) for seed in range(64)]
    mean = float(np.mean([auroc(score(f, held_out.activations, held_out.mask), held_out.labels) for f in fits]))
    assert abs(mean - 0.5) < 0.26, f"it declares learns=False but its AUROC averages {mean:.3f} over seeds"


def knows_no_more_than_it_was_told(case: Case) -> None:
    """The negative control: shuffled labels of held-out rows are not found; see the module."""
    rng = np.random.default_rng(np.random.SeedSequence([case.seed, 29]))
    # one of each pair is positive, at random; the same labelling for both
    first = rng.permutation(np.arange(len(case.data.pairs)) % 2)
    labels = np.concatenate([first, 1 - first])
    test = replace(take(case.held_out, rng.permutation(len(labels))), labels=labels)
    # pairs in name only: a positive and a negative each
    pairs = np.stack([np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)], axis=1)
    before = case.data.fit(case.probe, seed=case.seed, labels=labels)
    replace(test, pairs=pairs).fit(case.probe, seed=case.seed)
    fitted = case.data.fit(case.probe, seed=case.seed, labels=labels)
    scores = np.asarray(score(fitted, test.activations, test.mask))
    value, limit = auroc(scores, labels), chance(scores, labels, FALSE_ALARM / 2)
    assert 1 - limit <= value <= limit, (
        f"held-out rows under shuffled labels: AUROC {value:.3f}, where chance leaves "
        f"[{1 - limit:.3f}, {limit:.3f}] once in {1 / FALSE_ALARM:,.0f}; "
        "it remembers earlier fits, or answers by a row's position"
    )
    same_parameters(before, fitted, "fitting other rows in between changed the fit: it remembers earlier fits")


def chance(scores: np.ndarray, labels: np.ndarray, rate: float) -> float:
    """The AUROC that shuffled labels exceed at this rate: Mann-Whitney's null distribution, corrected for ties."""
    n, high = len(labels), int((labels == 1).sum())
    low = n - high
    _, counts = np.unique(scores, return_counts=True)
    ties = float((counts**3 - counts).sum()) / (n * (n - 1))
    variance = max(n + 1 - ties, 0.0) / (12 * high * low)
    # half a step for continuity: an AUROC is a multiple of 1 / (2 n1 n0)
    return 0.5 + float(np.sqrt(variance)) * NormalDist().inv_cdf(1 - rate) + 0.5 / (high * low)
