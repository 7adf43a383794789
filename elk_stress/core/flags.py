"""Red flags: what makes a number of bits untrustworthy, when each is raised, and what to do about it.

A flag never changes a number silently: it travels with the result, into the tables and into ``result.json``.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CATALOGUE", "FLIPPED_AUROC", "Flag", "FlagEntry", "flag"]

# below it a score separates the labels, the wrong way round
FLIPPED_AUROC = 0.4


@dataclass(frozen=True)
class FlagEntry:
    """One row of the catalogue: when a flag is raised and what a reader should do about it."""

    raised_if: str
    what_to_do: str
    red: bool = True


CATALOGUE: dict[str, FlagEntry] = {
    "did_not_engage": FlagEntry(
        "the attack did not lower the score that it was told to lower",
        "do not read this row as robustness; raise the attack's budget or step size, or check its gradient",
    ),
    "bounds_violated": FlagEntry(
        "an estimate lies above an upper bound or below a lower bound, beyond both intervals",
        "trust the bound, not the estimate; raise n_particles and look for a missed failure mode",
    ),
    "black_box_beats_white_box": FlagEntry(
        "an attack without gradients succeeded more often than the gradient attack on the same event",
        "the gradient is masked or the search too short; raise its starts and steps before believing B",
    ),
    "weak_beats_strong": FlagEntry(
        "random draws succeeded more often than an attack that may choose",
        "the stronger attack is broken or starved of budget; raise its budget",
    ),
    "runs_disagree": FlagEntry(
        "independent, differently started estimates disagree beyond their errors",
        "the interval is the union of both; raise n_particles or n_runs, or add starts in the missed region",
    ),
    "low_effective_sample_size": FlagEntry(
        "too few effective samples carry an importance estimate",
        "the centre is off the failure boundary; add starts or raise n_particles",
    ),
    "budget_exhausted": FlagEntry(
        "the evaluation budget ended before the method converged",
        "the answer is censored where the search stopped; raise max_evaluations",
    ),
    "fpr_unresolved": FlagEntry(
        "fewer calibration negatives than 3/fpr: the false-positive rate has no useful interval",
        "add calibration negatives or raise the false-positive rate",
    ),
    "behaviour_broken": FlagEntry(
        "most moves that break the probe also break behaviour",
        "read B_given_kept, not B_joint: breaking the model must never look like robustness",
    ),
    "diverged": FlagEntry(
        "training ended in numbers that are not finite",
        "these cells are reported and never counted as broken or held; lower the learning rate or the strength",
    ),
    "benign_broke_it": FlagEntry(
        "the benign control of equal size broke the probe too",
        "call the probe brittle, not attacked",
    ),
    "brittle": FlagEntry(
        "B is below 1 bit: ordinary variation breaks the probe",
        "no attack is needed; fix the probe or its threshold first",
    ),
    "leak": FlagEntry(
        "an entity occurs in more than one split, or items of two splits are nearly the same, far nearer than chance",
        "regroup the data so that no entity crosses: give nearly equal items one group, or drop the copies",
    ),
    "wide_interval": FlagEntry(
        "the 95% interval is wider than the estimate, or has no upper end",
        "raise the number of items, contexts or particles",
    ),
    "shared_contexts": FlagEntry(
        "probes were fitted, or may have been, on the very contexts that the prior is fitted on",
        "give more contexts (8 or more), or ones that a probe fitted elsewhere never saw: a probe learns to ignore "
        "those it saw, and its bits look too many",
        red=False,
    ),
    "no_contexts": FlagEntry(
        "no contexts tell how thoughts vary: moves are isotropic, at the activations' own scale",
        "these are no bits of natural thoughts; give activations (n, contexts, d), or a prior of your own",
        red=False,
    ),
    "massive_dimensions": FlagEntry(
        "a hundredth of the dimensions (at least one, of ten or more) hold 90% of the variance of training items",
        "distances and isotropic moves see these dimensions alone: trust probes that read every feature in its own "
        "units, and natural moves; or standardize the features first",
        red=False,
    ),
    "saturated": FlagEntry(
        "positives tie at the same scores, as on a plateau",
        "give the probe's logit, what stands before the squashing: on a plateau a threshold is an accident of rounding "
        "and attacks have no slope to follow",
        red=False,
    ),
    "catches_nothing": FlagEntry(
        "the probe catches no positive at its threshold",
        "it has no bits to lose; train a better probe or raise the false-positive rate",
        red=False,
    ),
    "flipped": FlagEntry(
        "the AUROC on test items lies far below 1/2: positives score lower than negatives",
        "the sign looks flipped: negate the score, or say which label is positive (positive=, --positive)",
        red=False,
    ),
    "prediction_failed": FlagEntry(
        "the observed best-of-n curve is more extreme than 99% of curves simulated from the prediction",
        "the prior does not describe real contexts for this probe; trust the observed curve",
    ),
    "control_failed": FlagEntry(
        "a control that must survive broke, or one that must break survived",
        "do not trust any number of this run until the control behaves",
    ),
    "missed_mode": FlagEntry(
        "splitting missed a failure region that importance sampling found; a rigorous bound settled it",
        "none needed: the estimate is the one that the bound supports",
        red=False,
    ),
    "origin_fails": FlagEntry(
        "the unmoved point already fails",
        "a distance (FORM) says nothing here; read the sampling estimate",
        red=False,
    ),
}


@dataclass(frozen=True)
class Flag:
    """A raised flag: its name in the catalogue and what was seen."""

    name: str
    detail: str = ""

    @property
    def entry(self) -> FlagEntry:
        """The catalogue row of this flag."""
        return CATALOGUE[self.name]

    @property
    def red(self) -> bool:
        """Whether ``--strict`` turns this flag into a failing exit code."""
        return self.entry.red

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}" if self.detail else self.name


def flag(name: str, detail: str = "") -> Flag:
    """Raise a flag by its catalogue name; an unknown name is a programming error and lists the known ones."""
    if name not in CATALOGUE:
        raise KeyError(f"no flag is called {name!r}; the catalogue has: {', '.join(sorted(CATALOGUE))}")
    return Flag(name, detail)
