r"""The ledger of bits: a probe that is not robust is still useful, as long as nobody spends too many bits against it.

Whoever picks the run that a probe likes best, or trains until it is content, optimizes against it. A ledger beside the
probe counts what was spent, refuses what is too much, and outlives the process. Each account (``selection``, ``kl``,
``mean_shift``, ``queries``) has its own unit, guarantee and budget: :mod:`elk_stress.ledger.budget` has the formulas.
They start from the bits of the caught items under one threat, of each a lower end, and the least over the tails that
were measured. The lower ends hold what is not known of the prior's scale, the contexts and the threshold, which the
interval of the half-life says (:mod:`elk_stress.ledger.terms`); bits that are given are taken as they are.

Accounts are never summed across kinds. Each guarantee is about moves that came *from the prior* and were changed in
that one way: a lineage with charges of two kinds has none of them, for good. So the first charge of a second kind is
refused (:class:`MixedCharge`) unless it says ``mix=True``; then the lineage is *mixed*, and nothing is said to remain.
What a guarantee bounds is the expected share of catches lost, items drawn like the measured ones.

**Queries are a record.** An answer moves nothing: a guarantee is about how the moves came to be, not about what anybody
knows. (Selection is bounded for the worst choice among the candidates, KL and shift are measured of the moves as they
are.) Queries alone hence leave the others standing. Only where answers were used to *design* moves of the lineage, so
that these are no longer the prior's changed in the one way charged, does nothing hold: such queries are charged with
``mix=True``, which makes a lineage mixed by itself; ``spend("queries", 0, mix=True)`` says it of earlier ones.

**Lineages: which charges add.** A lineage is one product whose safety is asked about.

* Selection adds where one feeds into the next: of N prior draws keep K, of these keep J, and each survivor (drawn
  blindly from the J) has ``P[event] <= (N/J) prior[event]``; the same where each step draws anew given what was kept.
  Unrelated products each have their own lineage and budget. Choosing among lineages is a selection too:
  ``parents=`` lets the new one begin with the most that any parent has spent.
* KL adds for stages that act one after another, each measured against what the prior does in the same situation (the
  chain rule). It does *not* add along retraining: q2 near q1 near the prior can lie far off (Gaussians: shifts add, and
  KL grows as their square). Measure q2 against the prior and charge up to that with ``total=``.
* Mean shifts add whatever their directions, by the triangle inequality; a measured total may be smaller (``total=``).
  They are lengths in u: under a heavy tail a fixed shift of activations is none (:mod:`elk_stress.ledger.budget`).

Two ledgers of one probe do not know of each other. Yudkowsky (2008) for bits of optimization;
:mod:`elk_stress.core.bits` for the guarantees.
"""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elk_stress.core.printable import check_name
from elk_stress.core.settings import SETTINGS, as_path, listed, setting, shown, truth
from elk_stress.ledger import store as ledger_store
from elk_stress.ledger.budget import Account as Account
from elk_stress.ledger.store import Charge as Charge
from elk_stress.ledger.store import LedgerDamaged as LedgerDamaged
from elk_stress.ledger.store import LedgerError as LedgerError
from elk_stress.ledger.terms import Terms as Terms
from elk_stress.ledger.terms import disagreement
from elk_stress.ledger.terms import fingerprint as fingerprint

__all__ = [
    "Account",
    "Balance",
    "BudgetExceeded",
    "BudgetWarning",
    "Charge",
    "Ledger",
    "LedgerDamaged",
    "LedgerError",
    "MixedCharge",
    "Terms",
    "fingerprint",
]

_SLACK = 1e-9
"""Bits by which rounding may overdraw an account: a budget of exactly 7 bits pays for 1 of 128."""


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


class MixedCharge(BudgetExceeded):
    """Refused: a charge that would leave its lineage without a guarantee, and does not say ``mix=True``."""


@dataclass(frozen=True)
class Balance:
    """One account of one lineage.

    Attributes:
        n_charges, spent: rows and their sum, in ``account.unit``.
        budget, remaining: ``None`` for queries; negative where the guarantee promises too little from the start.
            ``remaining`` is NaN on a mixed lineage.
        lost: bound on the expected share of catches lost; ``None`` where nothing is promised.
        worst_tail, remaining_worst: which of the result's tails would leave the least, and how much, if that is less
            than ``remaining``; else ``None``. For the reader: nothing is refused by it.
        mixed: this lineage has charges of several kinds, or queries that shaped its moves: no guarantee holds.
    """

    account: Account
    lineage: str
    n_charges: int
    spent: float
    budget: float | None
    remaining: float | None
    lost: float | None
    mixed: bool
    worst_tail: str | None = None
    remaining_worst: float | None = None


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
        TypeError: no path, no terms, or a timeout or ``readonly`` that is none.
        ValueError: the file is about another probe, threat, bits or tolerance.
    """

    def __init__(
        self, path: str | Path, terms: Terms | None = None, *, timeout: float = 30.0, readonly: bool = False
    ) -> None:
        self.path, timeout, readonly = as_path("path", path), setting("timeout", timeout), truth("readonly", readonly)
        if terms is not None and not isinstance(terms, Terms):
            raise TypeError(
                f"terms are elk_stress.ledger.Terms, e.g. Terms.of_result(result, threat); got {shown(terms)}"
            )
        if terms is not None and not readonly and not os.path.lexists(self.path):
            ledger_store.Store.create(self.path, terms.to_record())
        self._store = ledger_store.Store(self.path, timeout=timeout, readonly=readonly)
        self._budgets: dict[Account, float | None] = {}
        try:
            self.terms = Terms.of_record(self._store.record)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self.close()
            raise LedgerDamaged(
                f"the terms of the ledger {self.path} are none ({type(error).__name__}: {error}); restore a copy"
            ) from None
        if terms is not None and terms != self.terms:
            self.close()
            raise ValueError(disagreement(self.path, self.terms, terms))

    def __repr__(self) -> str:
        budgets = ((kind, self.budget(kind)) for kind in Account)
        told = ", ".join(f"{kind} {budget:.4g} {kind.unit}" for kind, budget in budgets if budget is not None)
        return f"Ledger({str(self.path)!r}, threat={self.terms.threat!r}, budget: {told})"

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
        mix: bool = False,
    ) -> Any:
        """The ``keep`` candidates that the probe prefers; charges ``log2(N/keep)`` before it returns them.

        The candidates must have come from the prior (or be what earlier selections of this lineage kept): the charge is
        right for them only. Each kept one is then lost with chance at most ``2^-(B-k)``, as a share of those kept.

        That holds for one of the kept drawn *blindly*. They come in the order in which they were given, so that their
        places say nothing; to use their scores further, e.g. to take the best of them, is another selection, to be
        charged as one. What was not kept must be discarded: to go on with it is a selection too, of ``N - keep`` by the
        opposite wish, and where few are left out a far dearer one, ``log2(N/(N-keep))``.

        Args:
            candidates: N of anything; an array's rows.
            score: ``(N,)`` scores, a function of one candidate, or a fitted probe for activations ``(N, d)``. Before a
                function or a probe sees a candidate the selection is charged: who was shown the scores of N can choose
                among N, whatever becomes of the call. So the charge stays where a score raises, is NaN, or the process
                dies.
            keep: how many.
            prefer: ``lowest``, the least like what a monitor must catch, or ``highest``. The charge is the same.
            lineage, parents, note, mix: see :meth:`spend`.

        Returns:
            A list, or an array of rows where an array was given, in the order of ``candidates``. Of equal scores the
            earlier is kept.

        Raises:
            BudgetExceeded: more than remains, or nothing remains at all, when nothing more may be scored, though all be
                kept; nothing was scored, and nothing charged.
            MixedCharge: the lineage has charges of another kind; the same.
            ValueError, TypeError: no candidates, an impossible ``keep``, given scores that are no numbers, another
                probe's, or anything else that can be known before a candidate is seen: nothing was charged. Scores that
                turn out to be none: the candidates were seen, and the charge stays, as the message says.
        """
        mix = truth("mix", mix)
        several = list(candidates) if isinstance(candidates, str) else candidates
        rows = several if hasattr(several, "shape") else listed("candidates", several, ())
        n = len(rows)
        whole = hasattr(keep, "__index__") and not isinstance(keep, (bool, np.bool_))
        if not whole or not 1 <= operator.index(keep) <= n:
            also = "" if whole else ", which is no whole number"
            raise ValueError(f"keep is between 1 and the number of candidates, {n}; got {keep!r}{also}")
        keep = operator.index(keep)
        if prefer not in ("lowest", "highest"):
            raise ValueError(f"prefer is 'lowest' or 'highest', got {prefer!r}")
        lineage, parents = _names(lineage, parents)
        _check_note(note)
        seen = self._scorer(rows, score)
        known = None if callable(seen) else _checked_scores(seen, n)
        charge = self._charge(
            Account.SELECTION,
            math.log2(n / keep),
            None,
            lineage,
            parents,
            f"kept {keep} of {n}",
            note,
            mix,
            scoring=True,
        )
        try:
            scores = known if known is not None else _checked_scores(seen(), n)
        except Exception as error:
            error.add_note(
                f"the candidates were shown to the score: charge {charge.id}, {charge.amount:g} bits of selection on "
                f"lineage {lineage!r}, stays"
            )
            raise
        # in the order given: a list sorted by the probe would make its head a free best of N
        chosen = np.sort(np.argsort(scores if prefer == "lowest" else -scores, kind="stable")[:keep])
        return rows[chosen] if isinstance(rows, np.ndarray) else [rows[i] for i in chosen.tolist()]

    def spend(
        self,
        account: Account | str,
        amount: float | None = None,
        *,
        total: float | None = None,
        lineage: str = "main",
        parents: Sequence[str] = (),
        note: str = "",
        mix: bool = False,
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
            mix: charge even what leaves the lineage without any guarantee, for good. Of queries it says that their
                answers shaped moves of this lineage; without it they are a record, which voids nothing.

        Raises:
            BudgetExceeded: it would exceed what remains; nothing was charged, and nothing taken over.
            MixedCharge: the lineage's first of a second kind, without ``mix``; the same.
            LedgerError: the file could not be written; nothing was charged.
            ValueError: an unknown account or parent, or an amount that is none.
        """
        kind = _account(account)
        if (amount is None) == (total is None):
            raise ValueError("give either an amount to add or the total that was measured")
        try:
            given = SETTINGS["amount"].convert(amount if amount is not None else total)
        except ValueError:
            asked = shown(amount if amount is not None else total)
            raise ValueError(f"{kind}: an amount is a finite number of {kind.unit} from 0 on, got {asked}") from None
        amount, total = (None if x is None else given for x in (amount, total))
        mix = truth("mix", mix)
        if kind is Account.QUERIES and not float(given).is_integer():
            raise ValueError(f"queries are counted in whole numbers, got {given}")
        lineage, parents = _names(lineage, parents)
        _check_note(note)
        record = kind is Account.QUERIES and not mix
        parts = (ledger_store.RECORDED if record else "", "" if total is None else f"up to {given:g}")
        added, total = (given, None) if total is None else (None, given)
        return self._charge(kind, added, total, lineage, parents, ", ".join(filter(None, parts)), note, mix)

    def budget(self, account: Account | str) -> float | None:
        """What may be spent on a lineage in all; ``None`` for queries, which carry no guarantee; may be negative."""
        kind = _account(account)
        if kind not in self._budgets:
            self._budgets[kind] = kind.remaining(np.asarray(self.terms.bits_low), self.terms.tolerated)
        return self._budgets[kind]

    def spent(self, account: Account | str, lineage: str = "main") -> float:
        """What has been spent."""
        lineage, _ = _names(lineage, ())
        with self._store.reading() as view:
            return view.spent(_account(account), lineage)

    def remaining(self, account: Account | str, lineage: str = "main") -> float | None:
        """Budget less spent; ``None`` for queries, and NaN on a mixed lineage, of which nothing is guaranteed.

        An account without charges beside one with some has all of it left, for a lineage of its own.
        """
        kind, (lineage, _) = _account(account), _names(lineage, ())
        budget = self.budget(kind)
        if budget is None:
            return None
        with self._store.reading() as view:
            used = _used(view, (lineage,))
            return math.nan if _mixed(used) else budget - view.spent(kind, lineage)

    def balances(self) -> tuple[Balance, ...]:
        """Every account of every lineage, from one view of the file."""
        rows = self._store.charges()
        found = []
        for lineage in dict.fromkeys([charge.lineage for charge in rows] or ["main"]):
            own = [charge for charge in rows if charge.lineage == lineage]
            spent = {charge.account: charge.spent for charge in own}
            used = {Account(kind) for kind, amount in spent.items() if amount > 0 and kind != Account.QUERIES}
            record = ledger_store.RECORDED
            if any(charge.account == Account.QUERIES and not charge.detail.startswith(record) for charge in own):
                used.add(Account.QUERIES)
            for account in Account:
                found.append(
                    self._balance(
                        account,
                        lineage,
                        sum(charge.account == account for charge in own),
                        spent.get(account, 0.0),
                        _mixed(used),
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
        if head is not None and not isinstance(head, str):
            raise TypeError(f"head is a hash that verify returned, a text; got {shown(head)}")
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
        mix: bool,
        *,
        scoring: bool = False,
    ) -> Charge:
        budget = self.budget(account)
        with self._store.writing() as book:
            _check_parents(book, parents)
            used = self._refuse_mixing(book, account, lineage, parents, amount, total, mix)
            _take_over(book, lineage, parents)
            before = {kind: book.spent(kind, lineage) for kind in Account}
            asked = amount if amount is not None else max(0.0, (total or 0.0) - before[account])
            self._refuse(account, lineage, before[account], asked, budget, scoring=scoring)
            charge = ledger_store.append(book, account, lineage, asked, detail=detail, note=note)
        # only now: where warnings are errors, the charge is made and the books are right
        self._warn(charge, budget, used, mix)
        return charge

    def _refuse_mixing(
        self,
        view: ledger_store.View,
        account: Account,
        lineage: str,
        parents: tuple[str, ...],
        amount: float | None,
        total: float | None,
        mix: bool,
    ) -> set[Account]:
        """Kinds on the lineage after the charge; refuses one that leaves it without a guarantee, if ``mix`` does not
        allow that. On a lineage that is mixed already nothing is left to lose."""
        used = _used(view, (lineage, *parents))
        before = max(view.spent(account, name) for name in (lineage, *parents))
        asked = amount if amount is not None else max(0.0, (total or 0.0) - before)
        after = used | ({account} if (mix if account is Account.QUERIES else asked > 0) else set())
        if mix or not _mixed(after) or _mixed(_used(view, (lineage,))):
            return after
        budget = self.budget(account)
        if Account.QUERIES in used:
            there = "has queries whose answers shaped its moves"
        elif _mixed(used):
            there = f"would have charges of several kinds ({', '.join(sorted(used))})"
        else:
            there = f"has charges of another kind ({', '.join(sorted(used - {account}))})"
        raise MixedCharge(
            f"{account}: lineage {lineage!r} of {self.terms.probe}{', by its parents,' if parents else ''} {there}, "
            "and each guarantee is about moves from the prior that were changed in one way: with this charge none "
            "would hold of it any more. Nothing was charged. Charge what came from the prior alone to a lineage of its "
            "own (lineage=, --lineage); where the same product was changed in both ways, say mix=True (--mix): then no "
            "guarantee holds of it, for good",
            account,
            lineage,
            asked,
            math.nan if budget is None else budget - before,
        )

    def _refuse(
        self,
        account: Account,
        lineage: str,
        spent: float,
        asked: float,
        budget: float | None,
        *,
        scoring: bool = False,
    ) -> None:
        if budget is None:
            return
        exhausted = scoring and budget - spent <= _SLACK
        if not exhausted and (asked == 0 or spent + asked <= budget + _SLACK):
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
        elif exhausted:
            why = (
                " Nothing more is scored, not even to keep all: begin a lineage afresh from the prior, or go on with "
                "another probe."
            )
        elif account is Account.SELECTION:
            why = (
                f" Choose among at most {2 ** max(left, 0.0):.4g} times as many candidates as are kept, begin a "
                "lineage afresh from the prior, or go on with another probe."
            )
        else:
            why = " Stop here, go back to an earlier product, or go on with another probe."
        raise BudgetExceeded(head + why, account, lineage, asked, left)

    def _warn(self, charge: Charge, budget: float | None, used: set[Account], mix: bool) -> None:
        account, lineage = Account(charge.account), charge.lineage
        said = []
        if budget is None and not mix and charge.spent == charge.amount > 0:
            said.append(
                f"queries are a record and carry no guarantee ({charge.spent:g} on lineage {lineage!r}); once their "
                "answers shape moves of this lineage, no other holds either: charge such queries with mix=True (--mix)"
            )
        if budget is not None and charge.amount > 0 and charge.spent >= self.terms.warn_at * budget:
            said.append(
                f"{account}: {charge.spent:.4g} of {budget:.4g} {account.unit} are spent on lineage {lineage!r} of "
                f"{self.terms.probe}; {max(budget - charge.spent, 0.0):.4g} remain, then charges are refused"
            )
        if _mixed(used) and (mix if budget is None else charge.amount > 0):
            kinds = ", ".join(kind for kind in Account if kind in used)
            what = (
                "queries that shaped its moves" if used == {Account.QUERIES} else f"charges of several kinds ({kinds})"
            )
            said.append(
                f"lineage {lineage!r} has {what}: each guarantee is about moves from the prior that were changed in "
                "one way, so none holds; begin a lineage for each"
            )
        for message in said:
            warnings.warn(message, BudgetWarning, stacklevel=4)

    def _balance(self, account: Account, lineage: str, count: int, spent: float, mixed: bool, speaks: bool) -> Balance:
        budget = self.budget(account)
        lost = account.lost(np.asarray(self.terms.bits_low), spent) if speaks and not mixed else None
        if budget is None:
            return Balance(account, lineage, count, spent, None, None, lost, mixed)
        if mixed:
            return Balance(account, lineage, count, spent, budget, math.nan, None, mixed)
        tails = {row.name: row.budget(account) for row in self.terms.elsewhere if row.of == "tail"}
        left = {name: other - spent for name, other in tails.items() if other is not None and other < budget}
        worst = min(left, key=left.__getitem__, default=None)
        least = None if worst is None else left[worst]
        return Balance(account, lineage, count, spent, budget, budget - spent, lost, mixed, worst, least)

    def _scorer(self, rows: Any, score: Any) -> Any:
        """Given scores, or a function without arguments that shows the candidates to whatever scores them."""
        if callable(getattr(score, "score", None)):
            mark = self.terms.fingerprint
            if mark.startswith("probe:") and hasattr(score, "parameters") and fingerprint(score) != mark:
                raise ValueError(
                    f"this ledger counts what is spent against {self.terms.probe}, and the score is another probe's "
                    f"({score.name}, or the same refitted); open a ledger for that one"
                )
            activations, dim = rows if hasattr(rows, "shape") else np.stack(rows), getattr(score, "dim", None)
            if dim is not None and activations.shape[-1] != dim:
                raise ValueError(f"the probe reads {dim} features and the candidates have {activations.shape[-1]}")
            return lambda: score.score(activations)
        return (lambda: [float(score(row)) for row in rows]) if callable(score) else score


def _checked_scores(found: Any, n: int) -> np.ndarray:
    try:
        scores = np.asarray(found.detach().cpu() if hasattr(found, "detach") else found, dtype=float)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"scores are one number for each candidate, got {shown(found)} ({error})") from None
    if scores.shape != (n,):
        raise ValueError(f"expected one score per candidate, shape ({n},), got shape {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(
            f"{int(np.isnan(scores).sum())} of {n} scores are NaN; leave these candidates out: one that cannot be "
            "scored cannot be chosen"
        )
    return scores


def _account(account: Account | str) -> Account:
    try:
        return Account(account)
    except ValueError:
        raise ValueError(f"no account is called {account!r}; there are: {', '.join(Account)}") from None


def _names(lineage: str, parents: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    found = tuple(listed("parents", parents, (str,)))
    if not all(isinstance(name, str) and name.strip() for name in (lineage, *found)):
        raise ValueError(f"a lineage has a name, got {lineage!r} with parents {found!r}")
    check_name(lineage, "the name of a lineage")
    if lineage in found:
        raise ValueError(f"lineage {lineage!r} cannot be its own parent; charges on one lineage add anyway")
    return lineage, found


def _check_note(note: object) -> None:
    try:
        assert isinstance(note, str)
        note.encode()
    except (AssertionError, UnicodeEncodeError):
        raise ValueError(f"a note is a text, got {note!r}") from None


def _check_parents(view: ledger_store.View, parents: tuple[str, ...]) -> None:
    known = view.lineages() if parents else []
    for parent in parents:
        if parent not in known:
            raise ValueError(
                f"no lineage is called {parent!r}; there are: {', '.join(known) or 'none yet'}. Candidates straight "
                "from the prior have no parent"
            )


def _used(view: ledger_store.View, names: Sequence[str]) -> set[Account]:
    """Kinds by which moves of these lineages were changed; queries are one only where their answers shaped moves."""
    kinds = (kind for kind in Account if kind is not Account.QUERIES)
    used = {kind for kind in kinds if any(view.spent(kind, name) > 0 for name in names)}
    return used | ({Account.QUERIES} if any(name in view.designed for name in names) else set())


def _mixed(used: set[Account]) -> bool:
    """Whether no guarantee holds. Designed moves have none, whatever else was done."""
    return len(used) > 1 or Account.QUERIES in used


def _take_over(book: ledger_store.View, lineage: str, parents: tuple[str, ...]) -> None:
    """Charge the lineage up to the most that any parent has spent; of queries also whether they shaped moves."""
    source = f"taken over from {', '.join(parents)}"
    for kind in Account if parents else ():
        most = max(book.spent(kind, parent) for parent in parents)
        more = most - book.spent(kind, lineage)
        shaped = kind is Account.QUERIES and any(parent in book.designed for parent in parents)
        if more > 0 or (shaped and lineage not in book.designed):
            record = kind is Account.QUERIES and not shaped
            detail = f"{ledger_store.RECORDED}, {source}" if record else source
            ledger_store.append(book, kind, lineage, max(more, 0.0), detail=detail)


def _reopen(path: Path, timeout: float, readonly: bool) -> Ledger:
    return Ledger(path, timeout=timeout, readonly=readonly)
