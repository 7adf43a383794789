"""The suite of an attack: what it proposes against half-spaces of known distance, and what it may ask for that.

=============================  =========================================================================================
declarations                   a frozen dataclass; access, scopes, needs and priors are known words
proposals                      finite moves of the right shape for any number of problems, dimension and budget
budget                         it never spends more than it was given, down to a single question
access                         it uses what it declares: no more (the oracle refuses) and no less
deterministic                  the same seed proposes the same moves, whatever was attacked in between; no hidden state
breaks_what_must_break         positive control: a half-space at half a standard deviation, for every problem
does_not_break_what_holds      negative control: where nothing fails, nothing is claimed to
finds_the_nearest_failure      with gradients: the half-space at 3 is reached at a length of at most 3.15
draws_from_the_prior           ``from_prior=True`` is true: variance and tail of the draws, each within five standard
                               errors (false alarm 6e-7); another seed gives other draws
chooses_from_the_pool          ``needs = ("pool",)``: every move is in its problem's pool, ``spent`` at most log2 n
control                        a ``control`` method asks the probe nothing and proposes well-formed moves
=============================  =========================================================================================

An attack that needs ``model_access`` runs through :mod:`elk_stress.testing.model_access` instead.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from elk_stress.estimators.limit_state import LimitState
from elk_stress.testing.shared import Checks, declared, no_hidden_state, read_only, refuses, run_checks, settings
from elk_stress.thoughts.attacks.protocol import Access, Attack, Need, Oracle, Proposal

__all__ = ["check_attack", "checks_for_attack"]

_ACCESS: tuple[Access, ...] = get_args(Access)


def check_attack(attack: Attack, *, seed: int = 0) -> list[str]:
    """Run every check that applies to ``attack`` and return their names.

    Raises:
        AssertionError: the first check that fails, by name.
    """
    return run_checks(f"attack {attack.name!r}", checks_for_attack(attack, seed=seed))


def checks_for_attack(attack: Attack, *, seed: int = 0) -> Checks:
    """The checks that apply to ``attack``, by name."""
    dim = 6
    problems = {"item": 3, "universal": 1}

    def oracle(
        distance: float,
        n_problems: int,
        budget: int = 600,
        *,
        constant: bool = False,
        pool_size: int = 32,
        dim: int = dim,
    ) -> _RecordingOracle:
        pool = None
        if "pool" in attack.needs:
            # alternatives of ordinary length, of which one (the last) fails the half-space of its problem
            rng = np.random.default_rng(np.random.SeedSequence(11))
            pool = rng.standard_normal((n_problems, pool_size, dim))
            weight = _directions(n_problems, dim)
            along = (pool * weight[:, None]).sum(axis=-1, keepdims=True)
            pool -= np.maximum(along - distance + 0.5, 0.0) * weight[:, None]
            pool[:, -1] = weight * (distance + 0.1)
            pool = read_only(pool)
        return _RecordingOracle(_half_spaces(distance, n_problems, dim, constant), attack.access, budget, pool)

    def propose(asked: Oracle, with_seed: int = seed) -> Proposal:
        return attack.propose(asked, seed=with_seed)

    def declarations() -> None:
        declared(attack, "an attack")
        assert attack.access in _ACCESS, f"access {attack.access!r} is none of {', '.join(_ACCESS)}"
        assert attack.scopes, "it must work in at least one scope"
        assert set(attack.scopes) <= set(problems), f"scopes {attack.scopes} are none of item, universal"
        assert set(attack.needs) <= set(get_args(Need)), f"needs {attack.needs} are none of {', '.join(get_args(Need))}"
        assert isinstance(attack.priors, tuple), "priors is a tuple of names of priors, empty for all"

    def proposals() -> None:
        from hypothesis import given
        from hypothesis import strategies as st

        for scope in attack.scopes:
            _well_formed(propose(oracle(3.0, problems[scope])), problems[scope], dim)

        @settings(6)
        @given(
            scope=st.sampled_from(attack.scopes),
            n_problems=st.integers(1, 5),
            width=st.integers(1, 12),
            limit=st.integers(30, 200),
            with_seed=st.integers(0, 2**32),
        )
        def holds(scope: str, n_problems: int, width: int, limit: int, with_seed: int) -> None:
            n_problems = n_problems if scope == "item" else 1
            asked = oracle(3.0, n_problems, limit, dim=width)
            _well_formed(propose(asked, with_seed), n_problems, width)

        holds()

    def budget() -> None:
        from hypothesis import example, given
        from hypothesis import strategies as st

        @settings(6)
        @given(limit=st.integers(1, 600))
        @example(limit=1)
        @example(limit=7)
        @example(limit=600)
        def holds(limit: int) -> None:
            # a pool is as large as what may be asked of it
            asked = oracle(3.0, problems[attack.scopes[0]], limit)
            _well_formed(propose(asked), asked.n_problems, dim)
            spent = int((asked.queries + asked.gradients).max())
            assert spent <= limit, f"it spent {spent} of a budget of {limit}"

        holds()

    def access() -> None:
        asked = oracle(3.0, problems[attack.scopes[0]])
        propose(asked)
        most = max(asked.asked, key=_ACCESS.index, default="none")
        assert most == attack.access or attack.access == "weights", (
            f"it declares {attack.access!r} access and used {most!r}; declare what it uses, no less and no more"
        )

    def deterministic() -> None:
        count = problems[attack.scopes[0]]
        with no_hidden_state(attack):
            first = propose(oracle(3.0, count)).moves.copy()
            # in between another problem: what it remembers of that would show
            propose(oracle(0.7, count), seed + 1)
            second = propose(oracle(3.0, count)).moves
        assert np.array_equal(first, second), "two runs from one seed propose different moves"

    def breaks_what_must_break() -> None:
        """Every attack within reach of an easy half-space; each problem has a direction of its own."""
        for scope in attack.scopes:
            asked = oracle(0.5, problems[scope])
            failed = asked.true_value(propose(asked).moves) <= 0
            assert failed.any(axis=1).all(), (
                f"a half-space at half a standard deviation held in {int((~failed.any(axis=1)).sum())} of "
                f"{len(failed)} problems ({scope} scope); does each problem get a move of its own?"
            )

    def finds_the_nearest_failure() -> None:
        asked = oracle(3.0, problems[attack.scopes[0]])
        proposal = propose(asked)
        best = proposal.moves[:, 0]
        assert (asked.true_value(best[:, None]) <= 0).all(), "the half-space at 3 sigma held against its first proposal"
        length = np.linalg.norm(best, axis=-1)
        assert length.max() <= 3.0 * 1.05, f"the half-space lies at 3 but the move has length {length.max():.3f}"

    def does_not_break_what_holds() -> None:
        asked = oracle(1.0, problems[attack.scopes[0]], constant=True)
        proposal = propose(asked)
        _well_formed(proposal, asked.n_problems, dim)
        assert (asked.true_value(proposal.moves) > 0).all(), "g = 1 everywhere and yet a move failed"

    def draws_from_the_prior() -> None:
        asked = oracle(1.0, problems[attack.scopes[0]])
        runs = [propose(oracle(1.0, problems[attack.scopes[0]]), with_seed=s) for s in range(40)]
        if not all(run.from_prior for run in runs):
            assert not any(run.from_prior for run in runs), "whether moves are draws from the prior must not vary"
            return
        assert not np.array_equal(runs[0].moves, runs[1].moves), "draws from the prior are the same for every seed"
        moves = np.concatenate([run.moves for run in runs], axis=1)
        # false alarm of each: five standard deviations
        share, n = float((asked.true_value(moves) <= 0).mean()), moves.shape[0] * moves.shape[1]
        expected = 0.15865525393145707
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / n), (
            f"{share:.3f} of {n} draws lie beyond one standard deviation; the prior says {expected:.3f}"
        )
        square = float((moves**2).mean())
        assert abs(square - 1) < 5 * np.sqrt(2 / moves.size), f"draws have variance {square:.3f}, not 1"

    def chooses_from_the_pool() -> None:
        asked = oracle(3.0, problems[attack.scopes[0]])
        proposal = propose(asked)
        assert asked.pool is not None
        for row in range(asked.n_problems):
            own = (asked.pool[row][None] == proposal.moves[row][:, None]).all(axis=-1).any(axis=1)
            assert own.all(), "it proposed a move that is not in its problem's pool"
        assert proposal.spent is not None, "an attack that chooses among n alternatives reports spent = log2 n"
        most = np.log2(asked.pool.shape[1])
        assert (proposal.spent <= most + 1e-12).all(), f"it reports {proposal.spent.max()} bits but log2 n = {most}"
        refuses(lambda: propose(_RecordingOracle(_half_spaces(3.0, 1, dim, False), attack.access, 600)), "pool")

    def control() -> None:
        asked = oracle(3.0, problems[attack.scopes[0]])
        proposal = propose(asked)
        spent = asked.queries + asked.gradients
        with no_hidden_state(attack):
            benign = attack.control(asked, proposal, seed=seed)  # type: ignore[attr-defined]
        _well_formed(benign, asked.n_problems, dim)
        assert np.array_equal(asked.queries + asked.gradients, spent), "its benign control asked the probe"

    if "model_access" in attack.needs:
        from elk_stress.testing.model_access import checks_for_model_access

        return {"declarations": declarations, **checks_for_model_access(attack, _well_formed, seed=seed)}
    checks: Checks = {
        "declarations": declarations,
        "proposals": proposals,
        "budget": budget,
        "access": access,
        "deterministic": deterministic,
        "breaks_what_must_break": breaks_what_must_break,
        "does_not_break_what_holds": does_not_break_what_holds,
    }
    if hasattr(attack, "control"):
        checks["control"] = control
    if attack.access in ("gradient", "weights"):
        checks["finds_the_nearest_failure"] = finds_the_nearest_failure
    if "pool" in attack.needs:
        checks["chooses_from_the_pool"] = chooses_from_the_pool
    else:
        checks["draws_from_the_prior"] = draws_from_the_prior
    return checks


class _RecordingOracle(Oracle):
    """An oracle that remembers which questions were asked; the suite looks past it at the true value."""

    def __init__(self, limit_state: LimitState, access: Access, budget: int, pool: np.ndarray | None = None) -> None:
        super().__init__(limit_state, access, budget, pool)
        self.asked: set[Access] = set()
        self._truth = limit_state

    def _need(self, access: Access) -> None:
        super()._need(access)
        self.asked.add(access)

    def true_value(self, moves: np.ndarray) -> np.ndarray:
        """g at ``(problems, n, dim)``, uncounted."""
        return self._truth.value(np.arange(self.n_problems), moves)


def _directions(n_problems: int, dim: int) -> np.ndarray:
    draws = np.random.default_rng(np.random.SeedSequence(5)).standard_normal((n_problems, dim))
    return np.asarray(draws / np.linalg.norm(draws, axis=1, keepdims=True))


def _half_spaces(distance: float, n_problems: int, dim: int, constant: bool) -> LimitState:
    """``g = distance - w_i . u`` with a direction for each problem, or ``g = 1`` everywhere."""
    weight = _directions(n_problems, dim) * (0.0 if constant else 1.0)
    offset = 1.0 if constant else distance
    return LimitState(
        function=lambda p, u: offset - np.einsum("pnk,pk->pn", u, weight[p]),
        dim=dim,
        n_problems=n_problems,
        gradient=lambda p, u: np.broadcast_to(-weight[p][:, None], u.shape),
    )


def _well_formed(proposal: Proposal, n_problems: int, dim: int) -> None:
    moves = proposal.moves
    good = moves.ndim == 3 and moves.shape[0] == n_problems and moves.shape[1] >= 1 and moves.shape[2] == dim
    assert good, f"moves have shape {moves.shape}; expected (problems={n_problems}, candidates >= 1, dim={dim})"
    assert np.isfinite(moves).all(), "a proposed move is not finite"
    if proposal.centre is not None:
        shape = proposal.centre.shape
        assert shape == (n_problems, dim), f"centre has shape {shape}; expected ({n_problems}, {dim})"
        assert np.isfinite(proposal.centre).all(), "the centre is not finite"
    if proposal.spent is not None:
        assert proposal.spent.shape == (n_problems,), f"spent has shape {proposal.spent.shape}, not ({n_problems},)"
        assert (proposal.spent >= 0).all(), "it spent a negative number of bits"
