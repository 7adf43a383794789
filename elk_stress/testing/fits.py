"""What every fit must hold to: a pure function of data and seed, that keeps what its traits promise.

``rotation_equivariant``, ``flips`` and ``negatives_only`` are promises about the fit; each is held against a second fit
on data that differ in just that. Tolerances are relative to the largest held-out score.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from elk_stress.core import registry
from elk_stress.probing.probe import FittedProbe
from elk_stress.testing.case import Case, close, score, spread, take
from elk_stress.testing.shared import declared, no_hidden_state, read_only, refuses, rotation, settings

__all__ = [
    "bad_data_is_refused",
    "declarations",
    "deterministic",
    "flips",
    "inputs_are_left_alone",
    "masked_tokens_change_nothing",
    "negatives_only",
    "no_mask_is_a_full_mask",
    "rotation_equivariant",
    "same_parameters",
    "save_and_load",
    "scoring_keeps_nothing",
    "streams",
    "what_it_needs_is_required",
    "width_and_mask_mismatches_are_refused",
]


def declarations(case: Case) -> None:
    """A frozen dataclass with a name and a docstring; traits that do not contradict each other."""
    declared(case.probe, "a probe")
    traits = case.probe.traits
    assert not (traits.negatives_only and traits.flips), "who never looks at positives cannot promise to flip"
    assert not (traits.linear and not traits.differentiable), "a linear score is differentiable; write it so"
    assert not (traits.flips and not traits.learns), "a probe that does not learn ignores the labels: it cannot flip"
    fitted = case.fitted
    assert isinstance(fitted, FittedProbe), f"fit returns {type(fitted).__name__}, not a FittedProbe"
    assert fitted.name == case.probe.name, f"fit returns a probe called {fitted.name!r}, not {case.probe.name!r}"
    for name, value in fitted.parameters.items():
        assert isinstance(value, np.ndarray), f"parameter {name!r} is {type(value).__name__}, not a numpy array"
        assert value.dtype != object, f"parameter {name!r} holds Python objects, not numbers"
    json.dumps(dict(fitted.notes))


def deterministic(case: Case) -> None:
    """The same seed and data give the same parameters bit for bit, whatever was fitted in between; no global state."""
    # in between it was fitted on swapped labels: what a probe remembers of these would show in the next fit
    same_parameters(case.fitted, case.again, "two fits from one seed differ")


def inputs_are_left_alone(case: Case) -> None:
    """It fits and scores arrays that cannot be written to, and what it was given before is as it was."""
    data, planted = case.data, Case(case.probe, case.seed).data
    assert case.again.parameters.keys() == case.fitted.parameters.keys(), "a fit on read-only arrays differs"
    for name in ("activations", "labels", "pairs"):
        given, kept = getattr(data, name), getattr(planted, name)
        assert np.array_equal(given, kept), f"fitting changed the {name} that it was given"
    score(case.fitted, read_only(data.activations), None if data.mask is None else read_only(data.mask))


def scoring_keeps_nothing(case: Case) -> None:
    """Scoring twice gives the same bit for bit, and leaves parameters, activations and global random states alone."""
    fitted, data = case.fitted, case.held_out
    before = {name: value.copy() for name, value in fitted.parameters.items()}
    activations = data.activations.copy()
    with no_hidden_state(case.probe):
        first = np.array(score(fitted, activations, data.mask))
        score(fitted, activations[::2] * 3 + 1, None if data.mask is None else data.mask[::2])
        second = score(fitted, activations, data.mask)
    assert np.array_equal(first, second), "scoring the same rows twice gives other scores: it remembers"
    assert np.array_equal(activations, data.activations), "scoring changed the activations"
    for name, value in fitted.parameters.items():
        assert np.array_equal(before[name], value), f"scoring changed parameter {name!r}"


def save_and_load(case: Case) -> None:
    """What was saved scores identically when it is read back: parameters, dtypes, recipe."""
    fitted, data = case.fitted, case.held_out
    with tempfile.TemporaryDirectory() as folder:
        loaded = _load(fitted, fitted.save(folder))
    for name, value in fitted.parameters.items():
        assert name in loaded.parameters, f"parameter {name!r} was not saved"
        read = loaded.parameters[name]
        same = read.dtype == value.dtype and read.shape == value.shape
        assert same, f"{name!r} was {value.dtype} {value.shape} and came back as {read.dtype} {read.shape}"
    assert loaded.probe == fitted.probe, f"the recipe changed from {fitted.probe} to {loaded.probe}"
    assert loaded.dim == fitted.dim, f"the width changed from {fitted.dim} to {loaded.dim}"
    for activations in (data.activations, data.activations.astype(np.float32)):
        same = np.array_equal(score(fitted, activations, data.mask), score(loaded, activations, data.mask))
        assert same, f"a saved and loaded probe scores differently in {activations.dtype}"


def _load(fitted: FittedProbe, folder: Path) -> FittedProbe:
    """By the registry where its recipe is registered, else by hand: a probe need not be installed to be tested."""
    known = fitted.name in registry.names("probes")
    if known and type(registry.load("probes", fitted.name)) is type(fitted.probe):
        return FittedProbe.load(folder)
    from safetensors.numpy import load_file

    record = json.loads((folder / "probe.json").read_text())
    recipe, parameters = type(fitted.probe)(**record["recipe"]), load_file(str(folder / "probe.safetensors"))
    return FittedProbe(recipe, parameters, record["site"], record["notes"], record["dim"])


def bad_data_is_refused(case: Case) -> None:
    """NaN, one class only, constant rows and labels that do not fit the rows."""
    data, probe = case.data, case.probe
    where = np.argwhere(np.ones(data.activations.shape) if data.mask is None else data.mask)[40]
    spoilt = data.activations.copy()
    spoilt[tuple(where)] = np.nan
    refuses(lambda: dataclasses.replace(data, activations=spoilt).fit(probe), "NaN")
    refuses(lambda: data.fit(probe, labels=np.ones_like(data.labels)), "one class")
    refuses(lambda: dataclasses.replace(data, activations=np.ones_like(spoilt)).fit(probe), "constant")
    refuses(lambda: data.fit(probe, labels=data.labels[:-1]), "labels")


def width_and_mask_mismatches_are_refused(case: Case) -> None:
    """Another width than it was fitted on; a mask for who reads no tokens, or of another number of tokens."""
    dim, fitted = case.data.dim, case.fitted
    shape = (2, *case.data.activations.shape[1:-1])
    assert fitted.dim == dim, f"it was fitted on {dim} features and says {fitted.dim}"
    message = refuses(lambda: fitted.score(np.zeros((*shape, dim + 1))), "features")
    assert str(dim) in message, f"the message must name the width it was fitted on ({dim}), it says: {message}"
    assert str(dim + 1) in message, f"the message must name the width that came ({dim + 1}), it says: {message}"
    if not case.probe.traits.tokens:
        refuses(lambda: fitted.score(np.zeros((2, dim)), np.ones(2, dtype=bool)), "mask")
        return
    wrong = np.ones((2, shape[1] + 1), dtype=bool)
    try:
        fitted.score(np.zeros((*shape, dim)), wrong)
    except (ValueError, IndexError):
        return
    raise AssertionError(f"activations of {shape[1]} tokens were scored under a mask of {shape[1] + 1}")


def what_it_needs_is_required(case: Case) -> None:
    """Without what it declares to need it is not fitted, and the message says what is missing."""
    traits = case.probe.traits
    for name in ("pairs", "prior", "behaviour"):
        if getattr(traits, f"needs_{name}"):
            without: dict[str, Any] = {name: None}
            refuses(functools.partial(case.data.fit, case.probe, **without), name)


def rotation_equivariant(case: Case) -> None:
    """Rotating activations (with prior and behaviour) before fitting changes no score."""
    turn = rotation(case.data.dim, case.seed)
    turned = case.data.rotated(turn).fit(case.probe, seed=case.seed)
    held_out = case.held_out
    there = score(turned, held_out.rotated(turn).activations, held_out.mask)
    here = score(case.fitted, held_out.activations, held_out.mask)
    size = spread(case.fitted, held_out)
    close(there, here, size, 1e-6, "it promises rotation_equivariant, but rotating before fitting changed scores")


def flips(case: Case) -> None:
    """Fitted on swapped labels it gives the negated score."""
    held_out = case.held_out
    here, there = (score(fitted, held_out.activations, held_out.mask) for fitted in (case.fitted, case.swapped))
    promise = "it promises flips, but fitted on swapped labels its score is not the negated one"
    close(there, -here, spread(case.fitted, held_out), 1e-6, promise)


def negatives_only(case: Case) -> None:
    """Other positives, or fewer, change nothing, bit for bit."""
    data = case.data
    positive = data.labels == 1
    rng = np.random.default_rng(np.random.SeedSequence([case.seed, 23]))
    wild = data.activations.copy()
    wild[positive] = 5.0 + 3.0 * rng.standard_normal(wild[positive].shape)
    # the last positives, so that the rows of what stays keep their order
    fewer = np.sort(np.concatenate([np.flatnonzero(~positive), np.flatnonzero(positive)[:7]]))
    for changed in (dataclasses.replace(data, activations=wild), take(data, fewer)):
        again = changed.fit(case.probe, seed=case.seed)
        same_parameters(case.fitted, again, "it promises negatives_only, but other positives changed the fit")


def streams(case: Case) -> None:
    """``fitter().update(batch)`` for batches of any sizes, then ``fit()``: what ``fit`` gives on all rows."""
    from hypothesis import given
    from hypothesis import strategies as st

    data, held_out = case.data, case.held_out
    probe: Any = case.probe
    assert hasattr(probe, "fitter"), "it promises streams but has no fitter()"
    n, size = len(data.labels), spread(case.fitted, held_out)
    expected = score(case.fitted, held_out.activations, held_out.mask)

    @settings(4)
    @given(cuts=st.lists(st.integers(1, n - 1), min_size=1, max_size=6, unique=True))
    def holds(cuts: list[int]) -> None:
        fitter: Any = probe.fitter()
        for rows in np.split(np.arange(n), sorted(cuts)):
            fitter.update(data.activations[rows], data.labels[rows])
        streamed = fitter.fit(seed=case.seed)
        assert isinstance(streamed, FittedProbe), f"the fitter's fit returns {type(streamed).__name__}"
        found = score(streamed, held_out.activations, held_out.mask)
        close(found, expected, size, 1e-5, f"fitted in batches cut at {sorted(cuts)} it scores differently")

    with no_hidden_state(probe):
        holds()


def masked_tokens_change_nothing(case: Case) -> None:
    """What stands where no token is (finite, however large) changes neither a score nor a fit."""
    held_out, size = case.held_out, spread(case.fitted, case.held_out)
    expected = score(case.fitted, held_out.activations, held_out.mask)
    for garbage in (0.0, 1.0, 1e8):
        found = score(case.fitted, held_out.spoilt(garbage).activations, held_out.mask)
        close(found, expected, size, 1e-9, f"numbers of size {garbage:g} where no token is changed a score")
    again = case.data.spoilt(1.0).fit(case.probe, seed=case.seed)
    found = score(again, held_out.activations, held_out.mask)
    close(found, expected, size, 1e-6, "what stands where no token is changed the fit")


def no_mask_is_a_full_mask(case: Case) -> None:
    """``mask=None`` means that all tokens are there, in ``fit`` and in ``score``."""
    held_out = case.held_out.spoilt(1.0)
    whole = dataclasses.replace(case.data.spoilt(1.0), mask=np.ones(case.data.activations.shape[:2], dtype=bool))
    full = np.ones(held_out.activations.shape[:2], dtype=bool)
    one, other = (whole.fit(case.probe, seed=case.seed, mask=mask) for mask in (whole.mask, None))
    size = spread(one, dataclasses.replace(held_out, mask=None))
    expected = one.score(held_out.activations, full)
    close(one.score(held_out.activations), expected, size, 1e-9, "a score without a mask is not that of a full one")
    found = other.score(held_out.activations, full)
    close(found, expected, size, 1e-6, "a fit without a mask is not that of a full one")


def same_parameters(one: FittedProbe, other: FittedProbe, promise: str) -> None:
    """Parameters are equal bit for bit; ``promise`` says what failed where they are not."""
    assert one.parameters.keys() == other.parameters.keys(), f"{promise}: other parameters"
    for name, value in one.parameters.items():
        same = np.array_equal(value, other.parameters[name], equal_nan=np.issubdtype(value.dtype, np.floating))
        assert same, f"{promise} in {name!r}"
