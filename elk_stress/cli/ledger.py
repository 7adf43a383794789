"""``elk-stress ledger show|spend|verify``: what was spent against a probe, and what remains.

Exit codes: 0 done; 1 the charge was refused, or the ledger is damaged; 2 bad usage or a file that cannot be used (one
line on stderr). Tables or, with ``--json``, numbers go to stdout; warnings and messages to stderr. Light to import.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elk_stress.core.printable import printable
from elk_stress.core.settings import option

if TYPE_CHECKING:
    from elk_stress.ledger.ledger import Balance, Ledger, Terms

__all__ = ["add_ledger", "run_ledger"]

DONE, REFUSED, USAGE = 0, 1, 2

_ACCOUNTS = ("selection", "kl", "mean_shift", "queries")
_EXAMPLES = """\
examples:
  elk-stress ledger show logistic.ledger --result runs/full/result.json --probe logistic --threat item/natural/gaussian
      open a ledger (made if there is none) for what a run measured
  elk-stress ledger spend logistic.ledger selection --of 16 --keep 1 --note "picked a seed"
      log2(16/1) = 4 bits, if that much remains
  elk-stress ledger spend logistic.ledger kl 0.2 --lineage tuned
      average KL from the prior in bits; mean_shift is a length in u, where the prior is N(0, I)
  elk-stress ledger spend logistic.ledger queries 500
      for the record: answers alone move nothing, so other guarantees stand
  elk-stress ledger spend logistic.ledger queries 500 --mix
      answers that were used to design moves of this lineage: no guarantee holds of it any more
  elk-stress ledger verify logistic.ledger --head 3f2a...
      rows, sums, hashes; --head: whether last charges were cut off since that hash was printed
one kind a lineage:
  each guarantee is about moves from the prior that were changed in one way, so the first charge of a second kind on a
  lineage is refused. Charge it to a --lineage of its own, or, if it is the same product, say --mix: then no guarantee
  holds of that lineage, for good, and nothing is said to remain.
exit codes: 0 done; 1 refused, since too little remains or kinds would mix, or the ledger is damaged; 2 bad usage or
input
"""


def add_ledger(commands: Any) -> None:
    """Add ``ledger`` and its actions to the subparsers ``commands`` of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    ledger = commands.add_parser(
        "ledger", help="count the bits spent against a probe", epilog=_EXAMPLES, formatter_class=raw
    )
    actions = ledger.add_subparsers(dest="action", required=True, metavar="show|spend|verify")

    show = actions.add_parser("show", help="accounts: spent, what remains, what that guarantees")
    spend = actions.add_parser("spend", help="charge, if that much remains", epilog=_EXAMPLES, formatter_class=raw)
    verify = actions.add_parser("verify", help="check every charge, sum and hash")
    for action in (show, spend, verify):
        action.add_argument("file", type=Path, metavar="FILE", help="the ledger")
        action.add_argument("--json", action="store_true", help="as one JSON object")
        action.add_argument(
            "--timeout",
            type=option("timeout"),
            default=30.0,
            metavar="SECONDS",
            help="wait for other writers (default: 30)",
        )
    for action in (show, spend):
        terms = action.add_argument_group("terms; a ledger that does not exist is made for them")
        terms.add_argument("--result", type=Path, metavar="FILE.json", help="result.json of elk-stress run")
        terms.add_argument("--probe", metavar="NAME", help="which probe of the result")
        terms.add_argument("--threat", metavar="NAME", help="a per-item threat, e.g. item/natural/gaussian")
        terms.add_argument(
            "--tolerated", type=option("tolerated"), metavar="SHARE", help="of catches, may be lost (default: 0.1)"
        )
        terms.add_argument(
            "--warn-at", type=option("warn_at"), metavar="SHARE", help="of a budget, then warn (default: 0.8)"
        )
    verify.add_argument("--head", metavar="HASH", help="one that was printed earlier")
    spend.add_argument("account", choices=_ACCOUNTS)
    spend.add_argument(
        "amount", nargs="?", type=option("amount"), help="bits; mean_shift: standard deviations of u; queries: a count"
    )
    spend.add_argument(
        "--total", type=option("amount"), metavar="X", help="instead: charge what is missing up to this total"
    )
    spend.add_argument("--of", type=option("of"), metavar="N", help="selection instead: the number of candidates")
    spend.add_argument("--keep", type=option("keep"), metavar="K", help="and how many of them were kept (default: 1)")
    spend.add_argument("--lineage", default="main", metavar="NAME", help="charges on one add (default: main)")
    spend.add_argument("--parents", default="", metavar="A,B", help="lineages whose spending it takes over")
    spend.add_argument(
        "--mix",
        action="store_true",
        help="allow a charge of a second kind, after which no guarantee holds of the lineage; with queries: their "
        "answers shaped its moves (without it they are a record, which voids nothing)",
    )
    spend.add_argument("--note", default="", metavar="TEXT", help="for the reader")


def run_ledger(options: argparse.Namespace) -> int:
    """Run one action; returns the exit code."""
    from elk_stress.ledger.ledger import BudgetExceeded, BudgetWarning, LedgerDamaged, LedgerError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BudgetWarning)
        try:
            code = {"show": _show, "spend": _spend, "verify": _verify}[options.action](options)
        except (BudgetExceeded, LedgerDamaged) as error:
            code = _say(error, REFUSED)
        except (LedgerError, ValueError, OSError) as error:
            code = _say(error, USAGE)
    for warning in caught:
        if issubclass(warning.category, BudgetWarning):
            _say(warning.message, code)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return code


def _show(options: argparse.Namespace) -> int:
    with _opened(options, readonly=options.result is None) as ledger:
        balances = ledger.balances()
        terms, budget = ledger.terms, ledger.budget("selection")
    if options.json:
        record = {"terms": json.loads(terms.to_record()), "balances": [_plain(asdict(row)) for row in balances]}
        print(json.dumps(record, allow_nan=False))
        return DONE
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    title = (
        f"Spent against {terms.probe} under {terms.threat}: {len(terms.bits_low)} caught items, "
        f"at most {100 * terms.tolerated:.3g}% of the catches may be lost"
    )
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=Text(printable(title)), title_justify="left"
    )
    for heading in (
        "lineage",
        "account",
        "charges",
        "spent",
        "budget",
        "remains",
        "worst tail",
        "lost, at most",
        "guarantee",
    ):
        right = heading not in ("lineage", "account", "guarantee")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in balances:
        table.add_row(*(Text(printable(cell)) for cell in _cells(row)))
    console.print(table)
    for line in _conditions(terms):
        console.print(Text(printable(line)))
    console.print(Text(printable(_limit(terms, budget))))
    console.print(
        "Accounts are never summed: each guarantee is about moves from the prior that were changed in one way."
    )
    if any(row.mixed for row in balances):
        console.print(
            "A mixed lineage has charges of several kinds, or queries whose answers shaped its moves: no guarantee "
            "holds of it."
        )
    return DONE


def _spend(options: argparse.Namespace) -> int:
    amount, detail = options.amount, ""
    if options.keep is not None and options.of is None:
        raise ValueError("--keep says how many of --of N candidates were kept; give both")
    if options.of is not None:
        keep = 1 if options.keep is None else options.keep
        if options.account != "selection" or amount is not None or options.total is not None:
            raise ValueError("--of and --keep are the amount of a selection; give them alone")
        if not 1 <= keep <= options.of:
            raise ValueError(f"--keep is between 1 and --of, {options.of}; got {keep}")
        amount, detail = math.log2(options.of / keep), f"kept {keep} of {options.of}"
    if amount is None and options.total is None:
        raise ValueError("what is to be charged? give an amount, --total, or for a selection --of and --keep")
    parents = [name.strip() for name in options.parents.split(",") if name.strip()]
    with _opened(options) as ledger:
        charge = ledger.spend(
            options.account,
            amount,
            total=options.total,
            lineage=options.lineage,
            parents=parents,
            note="; ".join(part for part in (detail, options.note) if part),
            mix=options.mix,
        )
        budget = ledger.budget(charge.account)
        left = None if budget is None else budget - charge.spent
        now = ledger.remaining(charge.account, charge.lineage)
    if now is not None and math.isnan(now):
        left = None
    if options.json:
        print(json.dumps(_plain({**asdict(charge), "remaining": left}), allow_nan=False))
    else:
        rest = "no guarantee" if left is None else f"{_number(max(left, 0.0))} remain"
        said = f"charge {charge.id}: {_number(charge.amount)} to {charge.account} on {charge.lineage}; "
        print(printable(f"{said}{_number(charge.spent)} spent, {rest}"))
    return DONE


def _verify(options: argparse.Namespace) -> int:
    from elk_stress.ledger.ledger import Ledger

    with Ledger(options.file, timeout=options.timeout, readonly=True) as ledger:
        head = ledger.verify(options.head)
        count = len(ledger.charges())
    if options.json:
        print(json.dumps({"charges": count, "head": head}))
    else:
        print(f"{count} charges hold; last hash {head}")
    return DONE


def _opened(options: argparse.Namespace, *, readonly: bool = False) -> Ledger:
    from elk_stress.ledger.ledger import Ledger, Terms

    if options.result is None:
        given = [name for name in ("probe", "threat", "tolerated", "warn_at") if getattr(options, name) is not None]
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"{flags} go with --result FILE.json; without it a ledger keeps its own terms")
        if not options.file.exists():
            raise ValueError(
                f"there is no ledger at {options.file}; give --result FILE.json, --probe and --threat to make one"
            )
        return Ledger(options.file, timeout=options.timeout, readonly=readonly)
    if options.threat is None:
        raise ValueError("--result needs --threat, e.g. item/natural/gaussian: bits are relative to one")
    shares = {name: getattr(options, name) for name in ("tolerated", "warn_at") if getattr(options, name) is not None}
    terms = Terms.of_result(options.result, options.threat, probe=options.probe, **shares)
    return Ledger(options.file, terms, timeout=options.timeout)


def _conditions(terms: Terms) -> list[str]:
    """Under which prior, tail and scale the budgets hold, and what they would be elsewhere."""
    prior = terms.threat.split("/")[1] if "/" in terms.threat else terms.threat
    if not terms.least_of:
        lines = [f"The budgets hold for the prior, tail and scale of {terms.threat}, as its bits were given."]
    else:
        tails = ", ".join(terms.least_of)
        lines = [
            f"The budgets hold for the {prior} prior, under each measured tail: {tails}.",
            _doubted(terms),
        ]
    for of, what in (("tail", "under one tail alone"), ("scale", "at multiples of the scale, Gaussian tails")):
        rows = [f"{row.name} {_number(row.selection)}" for row in terms.elsewhere if row.of == of]
        if rows:
            lines.append(f"Selection budget {what}: {', '.join(rows)} bits.")
    return lines


def _limit(terms: Terms, budget: float | None) -> str:
    """That nothing is refused by the worst tail, and what its limit on selection would be."""
    refused = "Charges are refused by the budget column only;"
    tails = {row.name: row.selection for row in terms.elsewhere if row.of == "tail"}
    worst = min(tails, key=tails.__getitem__, default=None)
    if worst is not None and budget is not None and tails[worst] < budget:
        return f"{refused} under {worst} {_number(max(tails[worst], 0.0))} bits would be the limit."
    if not tails.keys() - set(terms.least_of):
        return f"{refused} no other tail was measured."
    return f"{refused} no other tail of the result would leave less."


def _doubted(terms: Terms) -> str:
    """How far the uncertainty of the result as a whole is in the bits of each item."""
    known = dict(zip(terms.least_of, terms.deflated_by, strict=False))
    factors = {name: factor for name, factor in known.items() if factor is not None}
    if not factors:
        return (
            "They stand on the items' own lower ends alone: how uncertain the prior, its scale and the threshold are "
            "is not in them."
        )
    each = ", ".join(f"{_number(factor)} ({name})" for name, factor in factors.items())
    return (
        "Each item's distance from failure is shortened as far as the interval of the half-life (contexts, scale, "
        f"threshold) reaches down, by a factor of: {each}."
    )


def _cells(row: Balance) -> list[str]:
    if row.mixed:
        guarantee, lost = "none: mixed lineage", "-"
    else:
        guarantee, lost = row.account.guarantee, "-" if row.lost is None else f"{row.lost:.2%}"
    unit = {"selection": " bits", "kl": " bits", "mean_shift": " sd of u"}.get(row.account, "")
    spent = _number(row.spent) + unit
    budget, remaining = ("-" if x is None or math.isnan(x) else _number(x) for x in (row.budget, row.remaining))
    worst = "-" if row.remaining_worst is None else f"{_number(row.remaining_worst)} {row.worst_tail}"
    return [row.lineage, row.account.value, str(row.n_charges), spent, budget, remaining, worst, lost, guarantee]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """What JSON can say: infinities as strings, and null for what is not known."""
    plain = {}
    for name, value in record.items():
        odd = isinstance(value, float) and not math.isfinite(value)
        plain[name] = (None if math.isnan(value) else str(value)) if odd else value
    return plain


def _say(message: object, code: int) -> int:
    print(printable(f"elk-stress: {' '.join(str(message).split())}"), file=sys.stderr)
    return code
