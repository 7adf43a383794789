"""The registry: entry points -> names; what is unknown or misspelt lists what is known."""

from __future__ import annotations

import pytest

from elk_stress.core import registry
from elk_stress.core.registry import Group, UnknownName


@pytest.mark.parametrize(
    ("group", "known"),
    [
        ("probes", {"rock", "random_direction", "mass_mean", "lda", "logistic", "ccs"}),
        ("attacks", {"isotropic_noise", "natural_thoughts", "gradient", "best_of_n"}),
        ("testbeds", {"linear", "statements"}),
    ],
)
def test_ours_are_registered_and_described(group: Group, known: set[str]) -> None:
    described = registry.describe(group)
    assert known <= set(registry.names(group))
    assert list(described) == registry.names(group)
    assert all(len(line) > 15 for line in described.values())


def test_options_reach_the_recipe() -> None:
    assert registry.load("probes", "logistic", l2=0.5).l2 == 0.5
    assert registry.load("attacks", "gradient", starts=3).starts == 3
    assert registry.options("probes", "logistic") == ["l2", "max_iterations", "folds"]


def test_unknown_name_lists_the_known_and_the_closest() -> None:
    with pytest.raises(UnknownName) as caught:
        registry.load("probes", "logistc")
    assert str(caught.value).startswith("no probe is called 'logistc'. Did you mean 'logistic'? Known probes: ")
    assert "mass_mean" in str(caught.value)
    with pytest.raises(UnknownName) as caught:
        registry.options("attacks", "zzzzzz")
    assert "Did you mean" not in str(caught.value)
    assert "best_of_n" in str(caught.value)


def test_unknown_option_lists_those_it_takes() -> None:
    with pytest.raises(TypeError, match=r"probe 'logistic': .*C.*; it takes: l2, max_iterations, folds"):
        registry.load("probes", "logistic", C=1.0)
    with pytest.raises(TypeError, match="it takes: no options"):
        registry.load("probes", "rock", size=3)
