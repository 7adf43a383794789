r"""The ledger of bits: a probe that is not robust is still useful, as long as nobody spends too many bits against it.

Whoever picks the run that a probe likes best, or trains until it is content, optimizes against it. A ledger beside the
probe counts what was spent, refuses what is too much, and outlives the process. With ``B_i`` the bits of caught item i
under one threat (the lower ends of their intervals), ``t`` the tolerated loss of catches and ``mean_i`` over items:

==============  ================================  =================================================
account         spent                             what remains: the largest budget with
==============  ================================  =================================================
``selection``   k bits, log2(N/kept) a time       ``mean_i min(1, 2^(k-B_i)) <= t``
``kl``          k bits, E_q log2 dq/dprior        ``mean_i min(1, (k+1)/B_i) <= t``; far weaker
``mean_shift``  r, standard deviations in u       ``mean_i Phi(r - beta_i) <= t``, beta = -Phi^-1(2^-B)
``queries``     designed moves that were scored   no guarantee: one answer can be worth any number of bits
==============  ================================  =================================================

Accounts are never summed across kinds. Each guarantee is about moves that came *from the prior* and were changed in
that one way: a lineage with charges of two kinds has none of them, which the ledger says. What a guarantee bounds is
the expected share of catches lost, items drawn like the measured ones; the intervals are those of each ``B_i``.

**Lineages: which charges add.** A lineage is one product whose safety is asked about.

* Selection adds where one feeds into the next: of N prior draws keep K, of these keep J, and each survivor (drawn
  blindly from the J) has ``P[event] <= (N/J) prior[event]``; the same where each step draws anew given what was kept.
  Unrelated products each have their own lineage and budget. Choosing among lineages is a selection too:
  ``parents=`` lets the new one begin with the most that any parent has spent.
* KL adds for stages that act one after another, each measured against what the prior does in the same situation (the
  chain rule). It does *not* add along retraining: q2 near q1 near the prior can lie far off (Gaussians: shifts add, and
  KL grows as their square). Measure q2 against the prior and charge up to that with ``total=``.
* Mean shifts add whatever their directions, by the triangle inequality; a measured total may be smaller (``total=``).

Two ledgers of one probe do not know of each other. Yudkowsky (2008) for bits of optimization; :mod:`elk_stress.bits`
for the guarantees.
"""

from __future__ import annotations

import enum
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elk_stress import ledger_store
from elk_stress.ledger_store import Charge as Charge
from elk_stress.ledger_store import LedgerDamaged as LedgerDamaged
from elk_stress.ledger_store import LedgerError as LedgerError
from elk_stress.ledger_store import Terms as Terms
from elk_stress.ledger_store import checked, disagreement
from elk_stress.ledger_store import fingerprint as fingerprint

__all__ = [
    "Account",
    "Balance",
    "BudgetExceeded",
    "BudgetWarning",
    "Charge",
    "Ledger",
    "LedgerDamaged",
    "LedgerError",
    "Terms",
    "fingerprint",
    "lost_to_kl",
    "lost_to_mean_shift",
    "lost_to_selection",
    "remaining_kl",
    "remaining_mean_shift",
    "remaining_selection",
]

_SLACK = 1e-9
"""Bits by which rounding may overdraw an account: a budget of exactly 7 bits pays for 1 of 128."""


class Account(enum.StrEnum):
    """What was spent; each kind has its own unit, guarantee and budget."""

    SELECTION = "selection"
    KL = "kl"
    MEAN_SHIFT = "mean_shift"
    QUERIES = "queries"

    @property
    def unit(self) -> str:
        """Of amounts."""
        return {"mean_shift": "standard deviations", "queries": "queries"}.get(self.value, "bits")

    @property
    def guarantee(self) -> str:
        """What the charges promise about the chance a that an item is lost."""
        return {
            "selection": "a <= 2^-(B-k)",
            "kl": "a <= (k+1)/B",
            "mean_shift": "a <= Phi(r - beta)",
            "queries": "none: an answer to a designed move can be worth any number of bits",
        }[self.value]


class BudgetWarning(UserWarning):
    """Most of an account is spent, or its guarantee does not hold. The charge itself was made."""


class BudgetExceeded(RuntimeError):
    """Refused: the charge would exceed what remains. Nothing was charged.

    Args (also attributes): the message, the account, the lineage, the amount asked for and what remains.
    """

    def __init__(self, message: str, account: Account, lineage: str, asked: float, remaining: float) -> None:
        # all of them, so that it crosses process borders
        super().__init__(message, account, lineage, asked, remaining)
        self.account, self.lineage, self.asked, self.remaining = account, lineage, asked, remaining

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Balance:
    """One account of one lineage.

    Attributes:
        n_charges, spent: rows and their sum, in ``account.unit``.
        budget, remaining: ``None`` for queries; negative where the guarantee promises too little from the start.
        lost: bound on the expected share of catches lost; ``None`` where nothing is promised.
        mixed: this lineage has charges of another kind, so that no guarantee holds.
    """

    account: Account
    lineage: str
    n_charges: int
    spent: float
    budget: float | None
    remaining: float | None
    lost: float | None
    mixed: bool


class Ledger:
    """The ledger of one probe under one threat.

    ``Ledger(path, terms)`` opens the file, or makes it if there is none; ``Ledger(path)`` opens one that exists. Any
    number of processes and threads may do so at once. Use it as a context manager, or call :meth:`close`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "probe.ledger"
        >>> ledger = Ledger(path, Terms("mine", "v1", "item/natural/gaussian", (12.0, 15.0, 20.0)))
        >>> ledger.select(["a", "b", "c", "d"], score=[0.3, -1.0, 2.0, 0.1])
        ['b']
        >>> ledger.spent("selection")
        2.0
        >>> ledger.close()

    Args:
        path: the file; SQLite keeps ``-wal`` and ``-shm`` files beside it while it is open. On a local disk: WAL needs
            shared memory.
        terms: what it is for; must agree with what the file says.
        timeout: seconds to wait for other writers.
        readonly: only look.

    Raises:
        LedgerError: the file cannot be used.
        ValueError: the file is about another probe, threat, bits or tolerance.
    """

    def __init__(
        self, path: str | Path, terms: Terms | None = None, *, timeout: float = 30.0, readonly: bool = False
    ) -> None:
        self.path = Path(path)
        if terms is not None and not self.path.exists() and not readonly:
            ledger_store.Store.create(self.path, terms.to_record())
        self._store = ledger_store.Store(self.path, timeout=timeout, readonly=readonly)
        self.terms = Terms.of_record(self._store.record())
        self._budgets: dict[Account, float | None] = {}
        if terms is not None and terms != self.terms:
            self.close()
            raise ValueError(disagreement(self.path, self.terms, terms))

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # another process opens the file itself
        return _reopen, (self.path, self._store.timeout, self._store.readonly)

    def close(self) -> None:
        """Close the file."""
        self._store.close()

    def select(
        self,
        candidates: Sequence[Any] | np.ndarray,
        *,
        score: Any,
        keep: int = 1,
        prefer: Literal["lowest", "highest"] = "lowest",
        lineage: str = "main",
        parents: Sequence[str] = (),
        note: str = "",
    ) -> Any:
        """The ``keep`` candidates that the probe prefers, best first; charges ``log2(N/keep)`` before it returns them.

        The candidates must have come from the prior (or be what earlier selections of this lineage kept): the charge is
        right for them only. Each kept one is then lost with chance at most ``2^-(B-k)``, as a share of those kept.

        Args:
            candidates: N of anything; an array's rows.
            score: ``(N,)`` scores, a function of one candidate, or a fitted probe for activations ``(N, d)``.
            keep: how many.
            prefer: ``lowest``, the least like what a monitor must catch, or ``highest``. The charge is the same.
            lineage, parents, note: see :meth:`spend`.

        Returns:
            A list, or an array of rows where an array was given. Equal scores: the earlier first.

        Raises:
            BudgetExceeded: before anything was scored where that can be known, and in any case nothing was charged.
            ValueError: no candidates, an impossible ``keep``, scores that are no numbers, or another probe's.
        """
        n = len(candidates)
        if not 1 <= keep <= n:
            raise ValueError(f"keep is between 1 and the number of candidates, {n}; got {keep}")
        if prefer not in ("lowest", "highest"):
            raise ValueError(f"prefer is 'lowest' or 'highest', got {prefer!r}")
        bits = math.log2(n / keep)
        lineage, parents = _names(lineage, parents)
        budget = self.budget(Account.SELECTION)
        with self._store.reading() as view:
            _check_parents(view, parents)
            spent = max(ledger_store.spent(view, Account.SELECTION, name) for name in (lineage, *parents))
            self._refuse(Account.SELECTION, lineage, spent, bits, budget)
        scores = self._scores(candidates, score)
        self._charge(Account.SELECTION, bits, None, lineage, parents, f"kept {keep} of {n}", note)
        chosen = np.argsort(scores if prefer == "lowest" else -scores, kind="stable")[:keep]
        return candidates[chosen] if isinstance(candidates, np.ndarray) else [candidates[i] for i in chosen.tolist()]

    def spend(
        self,
        account: Account | str,
        amount: float | None = None,
        *,
        total: float | None = None,
        lineage: str = "main",
        parents: Sequence[str] = (),
        note: str = "",
    ) -> Charge:
        """Charge an amount, or up to a total; returns once it is on disk. Check and charge are one step.

        Args:
            account: ``selection``, ``kl``, ``mean_shift`` or ``queries``.
            amount: to be added, in the account's unit.
            total: instead: what the lineage has been measured to have spent in all; the difference is charged, and
                nothing where more is on the books.
            lineage: what the charge is about; see the module.
            parents: lineages that this one came from: it takes over the most that any of them has spent.
            note: for the reader.

        Raises:
            BudgetExceeded: it would exceed what remains; nothing was charged, and nothing taken over.
            LedgerError: the file could not be written; nothing was charged.
            ValueError: an unknown account or parent, or an amount that is none.
        """
        kind = _account(account)
        if (amount is None) == (total is None):
            raise ValueError("give either an amount to add or the total that was measured")
        given = float(amount if amount is not None else total)  # type: ignore[arg-type]
        if not 0 <= given < math.inf:
            raise ValueError(f"{kind}: an amount is a finite number of {kind.unit} from 0 on, got {given}")
        if kind is Account.QUERIES and not given.is_integer():
            raise ValueError(f"queries are counted in whole numbers, got {given}")
        lineage, parents = _names(lineage, parents)
        detail = "" if total is None else f"up to {given:g}"
        return self._charge(kind, amount, total, lineage, parents, detail, note)

    def budget(self, account: Account | str) -> float | None:
        """What may be spent on a lineage in all; ``None`` for queries, which carry no guarantee; may be negative."""
        kind = _account(account)
        if kind not in self._budgets:
            remaining = {
                Account.SELECTION: remaining_selection,
                Account.KL: remaining_kl,
                Account.MEAN_SHIFT: remaining_mean_shift,
            }.get(kind)
            bits = np.asarray(self.terms.bits_low)
            self._budgets[kind] = None if remaining is None else float(remaining(bits, self.terms.tolerated))
        return self._budgets[kind]

    def spent(self, account: Account | str, lineage: str = "main") -> float:
        """What has been spent."""
        with self._store.reading() as view:
            return ledger_store.spent(view, _account(account), lineage)

    def remaining(self, account: Account | str, lineage: str = "main") -> float | None:
        """Budget less spent; ``None`` for queries."""
        budget = self.budget(account)
        return None if budget is None else budget - self.spent(account, lineage)

    def balances(self) -> tuple[Balance, ...]:
        """Every account of every lineage, from one view of the file."""
        rows = self._store.charges()
        found = []
        for lineage in dict.fromkeys([charge.lineage for charge in rows] or ["main"]):
            own = [charge for charge in rows if charge.lineage == lineage]
            spent = {charge.account: charge.spent for charge in own}
            used = [account for account, amount in spent.items() if amount > 0]
            for account in Account:
                found.append(
                    self._balance(
                        account,
                        lineage,
                        sum(charge.account == account for charge in own),
                        spent.get(account, 0.0),
                        len(used) > 1,
                        # a guarantee speaks of all that was done: an untouched account is silent beside a used one
                        not used or account in used,
                    )
                )
        return tuple(found)

    def charges(self) -> list[Charge]:
        """All charges in order."""
        return self._store.charges()

    def verify(self, head: str | None = None) -> str:
        """Check every row, sum, hash and trigger, and that no account is overdrawn; returns the last hash.

        Args:
            head: a hash that an earlier call returned, kept elsewhere: shows whether last rows were cut off since.

        Raises:
            LedgerDamaged: what does not hold.
        """
        charges, last = self._store.verify()
        if head is not None and head not in {last, *(c.hash for c in charges), *(c.previous for c in charges)}:
            raise LedgerDamaged(
                f"{self.path}: the remembered hash {head[:12]}... is not in the chain: charges were cut off or "
                "rewritten; restore a copy"
            )
        for charge in charges:
            budget = self.budget(charge.account)
            if charge.amount > 0 and budget is not None and charge.spent > budget + _SLACK:
                raise LedgerDamaged(
                    f"{self.path}: charge {charge.id} overdraws {charge.account}, which is refused here"
                )
        return last

    def _charge(
        self,
        account: Account,
        amount: float | None,
        total: float | None,
        lineage: str,
        parents: tuple[str, ...],
        detail: str,
        note: str,
    ) -> Charge:
        budget = self.budget(account)
        with self._store.writing() as book:
            _check_parents(book, parents)
            for kind in Account if parents else ():
                most = max(ledger_store.spent(book, kind, parent) for parent in parents)
                more = most - ledger_store.spent(book, kind, lineage)
                if more > 0:
                    ledger_store.append(book, kind, lineage, more, detail=f"taken over from {', '.join(parents)}")
            before = {kind: ledger_store.spent(book, kind, lineage) for kind in Account}
            asked = amount if amount is not None else max(0.0, (total or 0.0) - before[account])
            self._refuse(account, lineage, before[account], asked, budget)
            charge = ledger_store.append(book, account, lineage, asked, detail=detail, note=note)
        # only now: where warnings are errors, the charge is made and the books are right
        others = [kind for kind in Account if before[kind] > 0 and kind is not account]
        self._warn(charge, budget, others)
        return charge

    def _refuse(self, account: Account, lineage: str, spent: float, asked: float, budget: float | None) -> None:
        if budget is None or asked == 0 or spent + asked <= budget + _SLACK:
            return
        terms, left = self.terms, budget - spent
        head = (
            f"{account}: {asked:.6g} {account.unit} asked for, but {max(left, 0.0):.6g} of {max(budget, 0.0):.6g} "
            f"remain on lineage {lineage!r} of {terms.probe} (at most {100 * terms.tolerated:.3g}% of its catches may "
            f"be lost under {terms.threat}). Nothing was charged."
        )
        if budget <= 0 and account is Account.KL:
            why = " (k+1)/B promises nothing here even at 0 bits; charge selection, or measure the mean shift."
        elif budget <= 0:
            why = " As much is lost though nobody optimizes: do not choose by this probe, or find a better one."
        elif account is Account.SELECTION:
            why = (
                f" Choose among at most {2 ** max(left, 0.0):.4g} times as many candidates as are kept, begin a "
                "lineage afresh from the prior, or go on with another probe."
            )
        else:
            why = " Stop here, go back to an earlier product, or go on with another probe."
        raise BudgetExceeded(head + why, account, lineage, asked, left)

    def _warn(self, charge: Charge, budget: float | None, others: list[Account]) -> None:
        account, lineage = Account(charge.account), charge.lineage
        said = []
        if budget is None and charge.spent == charge.amount > 0:
            said.append(f"queries with designed moves carry no guarantee ({charge.spent:g} on lineage {lineage!r})")
        if budget is not None and charge.amount > 0 and charge.spent >= self.terms.warn_at * budget:
            said.append(
                f"{account}: {charge.spent:.4g} of {budget:.4g} {account.unit} are spent on lineage {lineage!r} of "
                f"{self.terms.probe}; {max(budget - charge.spent, 0.0):.4g} remain, then charges are refused"
            )
        if others and charge.amount > 0:
            said.append(
                f"lineage {lineage!r} has charges of several kinds ({', '.join([account, *others])}): each guarantee "
                "is about moves from the prior that were changed in one way, so none holds; begin a lineage for each"
            )
        for message in said:
            warnings.warn(message, BudgetWarning, stacklevel=4)

    def _balance(self, account: Account, lineage: str, count: int, spent: float, mixed: bool, speaks: bool) -> Balance:
        budget = self.budget(account)
        bound: dict[Account, Callable[..., Any]] = {
            Account.SELECTION: lost_to_selection,
            Account.KL: lost_to_kl,
            Account.MEAN_SHIFT: lost_to_mean_shift,
        }
        lost = None
        if account in bound and speaks and not mixed:
            lost = float(bound[account](np.asarray(self.terms.bits_low), spent))
        return Balance(account, lineage, count, spent, budget, None if budget is None else budget - spent, lost, mixed)

    def _scores(self, candidates: Any, score: Any) -> np.ndarray:
        if callable(getattr(score, "score", None)):
            mark = self.terms.fingerprint
            if mark.startswith("probe:") and hasattr(score, "parameters") and fingerprint(score) != mark:
                raise ValueError(
                    f"this ledger counts what is spent against {self.terms.probe}, and the score is another probe's "
                    f"({score.name}, or the same refitted); open a ledger for that one"
                )
            found = score.score(candidates if hasattr(candidates, "shape") else np.stack(candidates))
        elif callable(score):
            found = [float(score(candidate)) for candidate in candidates]
        else:
            found = score
        scores = np.asarray(found.detach().cpu() if hasattr(found, "detach") else found, dtype=float)
        if scores.shape != (len(candidates),):
            raise ValueError(f"expected one score per candidate, shape ({len(candidates)},), got shape {scores.shape}")
        if np.isnan(scores).any():
            raise ValueError(
                f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN; leave these candidates out: one that "
                "cannot be scored cannot be chosen"
            )
        return scores


def lost_to_selection(bits_low: np.ndarray, spent: Any) -> Any:
    """``mean_i min(1, 2^(k-B_i))``: items on the last axis of ``(*batch, n_items)``, ``spent`` ``(*batch,)`` bits."""
    bits = np.asarray(bits_low, dtype=float)
    return np.exp2(np.minimum(np.asarray(spent, dtype=float)[..., None] - bits, 0.0)).mean(axis=-1)


def lost_to_kl(bits_low: np.ndarray, spent: Any) -> Any:
    """``mean_i min(1, (k+1)/B_i)``; shapes as in :func:`lost_to_selection`."""
    bits = np.asarray(bits_low, dtype=float)
    ahead = np.asarray(spent, dtype=float)[..., None] + 1.0
    # where ahead >= bits the share is 1, without dividing by bits, which may be 0
    return np.where(ahead >= bits, 1.0, ahead / np.where(ahead >= bits, 1.0, bits)).mean(axis=-1)


def lost_to_mean_shift(bits_low: np.ndarray, spent: Any) -> Any:
    """``mean_i Phi(r - beta_i)``; shapes as in :func:`lost_to_selection`, ``spent`` r in standard deviations."""
    from scipy.special import ndtr

    return ndtr(np.asarray(spent, dtype=float)[..., None] - _beta(np.asarray(bits_low, dtype=float))).mean(axis=-1)


def remaining_selection(bits_low: np.ndarray, tolerated: Any) -> Any:
    r"""Largest k in bits with ``mean_i min(1, 2^(k-B_i)) <= tolerated``.

    For j saturated items (those of the j smallest B_i) the mean is ``j/n + 2^k S_j/n``, ``S_j = sum_{i>j} 2^-B_i``; the
    true mean is the smallest of these over j. Hence ``k = max_j log2((tolerated - j/n) / (S_j/n))``: exact, no search.
    All ``B_i = B``: ``k = B + log2 tolerated``.

    Args:
        bits_low: ``(*batch, n_items)`` bits from 0 on; ``inf`` for items that no move breaks.
        tolerated: share in (0, 1), ``(*batch,)``.

    Returns:
        ``(*batch,)``; ``inf`` where losing every breakable item would be tolerated, negative where more is lost though
        nobody optimizes.

    Raises:
        ValueError: no items, NaN or negative bits, or a tolerance outside (0, 1).
    """
    bits, share = checked(bits_low, tolerated)
    slack = share[..., None] - np.arange(bits.shape[-1] + 1) / bits.shape[-1]
    tail = np.logaddexp2.accumulate(-np.sort(bits, axis=-1)[..., ::-1], axis=-1)[..., ::-1]
    tail = np.concatenate([tail, np.full((*tail.shape[:-1], 1), -np.inf)], axis=-1) - math.log2(bits.shape[-1])
    tail, slack = np.broadcast_arrays(tail, slack)
    room = np.log2(slack, out=np.full(slack.shape, -np.inf), where=slack > 0)
    # nothing left to lose: no k is too large
    room = np.where((slack >= 0) & np.isneginf(tail), np.inf, room - np.where(np.isneginf(tail), 0.0, tail))
    return room.max(axis=-1)[()]


def remaining_kl(bits_low: np.ndarray, tolerated: Any) -> Any:
    """Largest k in bits with ``mean_i min(1, (k+1)/B_i) <= tolerated``; otherwise as :func:`remaining_selection`.

    ``-inf`` where items of 0 bits alone are more than is tolerated. Any other negative number means that the guarantee
    promises nothing at this tolerance (it needs B above ``1/tolerated``), not that anything is lost.
    """
    bits, share = checked(bits_low, tolerated)
    n = bits.shape[-1]
    slack = share[..., None] - np.arange(n + 1) / n
    ordered = np.sort(bits, axis=-1)[..., ::-1]
    # bits so few that their inverses would overflow count as 0: lost already
    inverse = np.divide(1.0, ordered, out=np.full(ordered.shape, np.inf), where=ordered > 1e-300)
    tail = np.cumsum(inverse, axis=-1)[..., ::-1] / n
    tail = np.concatenate([tail, np.zeros((*tail.shape[:-1], 1))], axis=-1)
    tail, slack = np.broadcast_arrays(tail, slack)
    possible = (slack >= 0) & np.isfinite(tail)
    ahead = np.divide(slack, tail, out=np.full(slack.shape, -np.inf), where=possible & (tail > 0))
    return (np.where(possible & (tail == 0), np.inf, ahead).max(axis=-1) - 1.0)[()]


def remaining_mean_shift(bits_low: np.ndarray, tolerated: Any) -> Any:
    """Largest r with ``mean_i Phi(r - beta_i) <= tolerated``; as :func:`remaining_selection`, by bisection.

    All ``B_i = B``: ``r = beta + Phi^-1(tolerated)``. ``-inf`` where items of 0 bits alone are more than is tolerated.
    """
    from scipy.special import ndtr, ndtri

    bits, share = checked(bits_low, tolerated)
    beta = _beta(bits)
    shape = np.broadcast_shapes(beta.shape[:-1], share.shape)
    beta = np.broadcast_to(beta, (*shape, bits.shape[-1]))
    # the breakable items must pay for themselves with what the already lost ones leave of the tolerance
    finite, lost = np.isfinite(beta), np.isneginf(beta).mean(axis=-1)
    movable = finite.mean(axis=-1)
    target = np.divide(share - lost, movable, out=np.full(shape, np.nan), where=movable > 0)
    inside = (target > 0) & (target < 1)
    edge = ndtri(np.where(inside, target, 0.5))
    low = np.where(inside, np.where(finite, beta, np.inf).min(axis=-1) + edge, 0.0)
    high = np.where(inside, np.where(finite, beta, -np.inf).max(axis=-1) + edge, 0.0)
    # to the last bit of a double
    for _ in range(70):
        middle = 0.5 * (low + high)
        fits = ndtr(middle[..., None] - beta).mean(axis=-1) <= share
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return np.where(inside, low, np.where(share >= lost + movable, np.inf, -np.inf))[()]


def _beta(bits: np.ndarray) -> np.ndarray:
    from scipy.special import ndtri_exp

    # 0 bits: lost already (-inf); inf bits: never (inf)
    return np.asarray(-ndtri_exp(-bits * math.log(2.0)))


def _account(account: Account | str) -> Account:
    try:
        return Account(account)
    except ValueError:
        raise ValueError(f"no account is called {account!r}; there are: {', '.join(Account)}") from None


def _names(lineage: str, parents: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    found = (parents,) if isinstance(parents, str) else tuple(parents)
    if not all(isinstance(name, str) and name.strip() for name in (lineage, *found)):
        raise ValueError(f"a lineage has a name, got {lineage!r} with parents {found!r}")
    if lineage in found:
        raise ValueError(f"lineage {lineage!r} cannot be its own parent; charges on one lineage add anyway")
    return lineage, found


def _check_parents(view: Any, parents: tuple[str, ...]) -> None:
    known = ledger_store.lineages(view) if parents else []
    for parent in parents:
        if parent not in known:
            raise ValueError(
                f"no lineage is called {parent!r}; there are: {', '.join(known) or 'none yet'}. Candidates straight "
                "from the prior have no parent"
            )


def _reopen(path: Path, timeout: float, readonly: bool) -> Ledger:
    return Ledger(path, timeout=timeout, readonly=readonly)
