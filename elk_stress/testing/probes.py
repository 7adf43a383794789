"""The suite of a probe: which checks its declared traits ask for.

=========================================  =============================================================================
always                                     declarations, shapes, rows_are_independent, array_libraries, save_and_load,
                                           deterministic, inputs_are_left_alone, scoring_keeps_nothing,
                                           bad_data_is_refused, width_and_mask_mismatches_are_refused,
                                           knows_no_more_than_it_was_told
``learns`` or not                          learns and unsaturated, or does_not_learn
``differentiable``                         gradients, transforms; without it only numpy must be scored
``linear``                                 linear
``rotation_equivariant``, ``flips``        of the same names
``negatives_only``                         negatives_only
``needs_pairs``, ``needs_prior``,          what_it_needs_is_required
``needs_behaviour``
``tokens``                                 masked_tokens_change_nothing, no_mask_is_a_full_mask
``streams``                                streams
a method ``lipschitz``, or ``linear``      lipschitz
=========================================  =============================================================================

What each check demands stands in its docstring (:mod:`~elk_stress.testing.scores`, :mod:`~elk_stress.testing.fits`,
:mod:`~elk_stress.testing.controls`), tolerances and false-alarm rates in those modules.
"""

from __future__ import annotations

import functools

from elk_stress.probing.probe import Probe, check_recipe
from elk_stress.testing import controls, fits, scores
from elk_stress.testing.case import Case
from elk_stress.testing.shared import Checks, run_checks

__all__ = ["check_probe", "checks_for_probe"]


def check_probe(probe: Probe, *, seed: int = 0) -> list[str]:
    """Run every check that applies to ``probe`` and return their names.

    Args:
        probe: a recipe, which is fitted on planted data (:func:`elk_stress.testing.planted_classes`, 320 rows in 16
            dimensions, of tokens 6 reads each). It need not be registered.
        seed: of the data and the fits.

    Raises:
        TypeError: it is no recipe (no ``name``, ``traits``, ``fit`` or ``score``).
        AssertionError: the first check that fails, by name, with the promise that was broken.
    """
    check_recipe(probe)
    return run_checks(f"probe {probe.name!r}", checks_for_probe(probe, seed=seed))


def checks_for_probe(probe: Probe, *, seed: int = 0) -> Checks:
    """The checks that apply to ``probe``, by name; they share their fits."""
    traits = probe.traits
    needs = traits.needs_pairs or traits.needs_prior or traits.needs_behaviour
    steep = not traits.tokens and (traits.linear or hasattr(probe, "lipschitz"))
    table = [
        (True, fits.declarations),
        (True, scores.shapes),
        (True, fits.scoring_keeps_nothing),
        (True, scores.rows_are_independent),
        (True, scores.array_libraries),
        (True, fits.save_and_load),
        (True, fits.deterministic),
        (True, fits.inputs_are_left_alone),
        (True, fits.bad_data_is_refused),
        (True, fits.width_and_mask_mismatches_are_refused),
        (needs, fits.what_it_needs_is_required),
        (traits.learns, controls.learns),
        (traits.learns, scores.unsaturated),
        (not traits.learns, controls.does_not_learn),
        (True, controls.knows_no_more_than_it_was_told),
        (traits.differentiable, scores.gradients),
        (traits.differentiable, scores.transforms),
        (traits.linear, scores.linear),
        (traits.rotation_equivariant, fits.rotation_equivariant),
        (traits.flips, fits.flips),
        (traits.negatives_only, fits.negatives_only),
        (traits.tokens, fits.masked_tokens_change_nothing),
        (traits.tokens, fits.no_mask_is_a_full_mask),
        (traits.streams, fits.streams),
        (steep, scores.lipschitz),
    ]
    case = Case(probe, seed)
    return {check.__name__: functools.partial(check, case) for applies, check in table if applies}
