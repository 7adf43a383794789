"""The oracle: counts every question, keeps to the budget, and answers no more than was declared."""

from __future__ import annotations

import numpy as np
import pytest

from elk_stress.estimators.limit_state import BudgetExhausted, LimitState
from elk_stress.thoughts.attacks.protocol import Access, Oracle

ORDER: tuple[Access, ...] = ("none", "label", "score", "gradient", "weights")


def _half_spaces() -> LimitState:
    offset = np.array([1.0, 2.0, 3.0])
    return LimitState(
        lambda p, u: offset[p][:, None] - u[..., 0],
        2,
        3,
        gradient=lambda p, u: np.broadcast_to(np.array([-1.0, 0.0]), u.shape),
    )


@pytest.mark.parametrize("declared", ORDER)
@pytest.mark.parametrize("asked", ["label", "score", "gradient"])
def test_no_more_than_declared(declared: Access, asked: Access) -> None:
    oracle = Oracle(_half_spaces(), declared, 10)
    question = getattr(oracle, asked)
    if ORDER.index(declared) < ORDER.index(asked):
        with pytest.raises(PermissionError, match=f"declares '{declared}' access asked for '{asked}'"):
            question(np.arange(3), np.zeros((3, 1, 2)))
        assert oracle.queries.sum() == oracle.gradients.sum() == 0
    else:
        question(np.arange(3), np.zeros((3, 1, 2)))
        assert oracle.queries.sum() + oracle.gradients.sum() == 3


def test_answers() -> None:
    oracle = Oracle(_half_spaces(), "gradient", 100)
    u = np.zeros((2, 2, 2))
    u[:, 1, 0] = 2.0
    np.testing.assert_array_equal(oracle.score(np.array([0, 2]), u), [[1.0, -1.0], [3.0, 1.0]])
    np.testing.assert_array_equal(oracle.label(np.array([0, 1]), u), [[False, True], [False, True]])
    g, slope = oracle.gradient(np.array([1]), u[:1])
    np.testing.assert_array_equal(g, [[2.0, 0.0]])
    np.testing.assert_array_equal(slope[0], [[-1.0, 0.0]] * 2)


def test_counts_per_problem() -> None:
    oracle = Oracle(_half_spaces(), "gradient", 100)
    oracle.score(np.array([0, 2]), np.zeros((2, 5, 2)))
    oracle.label(np.array([2]), np.zeros((1, 3, 2)))
    oracle.gradient(np.array([1, 2]), np.zeros((2, 4, 2)))
    assert oracle.queries.tolist() == [5, 0, 8]
    assert oracle.gradients.tolist() == [0, 4, 4]


def test_the_budget_covers_values_and_gradients_together_and_refuses_before_asking() -> None:
    oracle = Oracle(_half_spaces(), "gradient", 10)
    oracle.score(np.array([0]), np.zeros((1, 6, 2)))
    oracle.gradient(np.array([0]), np.zeros((1, 4, 2)))
    with pytest.raises(BudgetExhausted, match="budget of 10 per problem"):
        oracle.score(np.array([0]), np.zeros((1, 1, 2)))
    assert oracle.queries.tolist() == [6, 0, 0]
    # another problem has its own budget
    oracle.score(np.array([1]), np.zeros((1, 10, 2)))


def test_finite_differences_are_paid_for() -> None:
    plain = LimitState(lambda p, u: (u**2).sum(axis=-1) - 1.0, 4)
    oracle = Oracle(plain, "gradient", 100)
    point = np.array([[[1.0, 2.0, 3.0, 4.0]]])
    _, slope = oracle.gradient(np.array([0]), point)
    np.testing.assert_allclose(slope, 2 * point, rtol=1e-6)
    assert (oracle.queries[0], oracle.gradients[0]) == (8, 1)
