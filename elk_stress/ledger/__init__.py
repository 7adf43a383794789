"""Bits that a user spends against a probe: a ledger that counts them, refuses, and outlives the process."""

from __future__ import annotations

from elk_stress.ledger.ledger import Balance as Balance
from elk_stress.ledger.ledger import BudgetExceeded as BudgetExceeded
from elk_stress.ledger.ledger import Ledger as Ledger
from elk_stress.ledger.ledger import LedgerError as LedgerError
from elk_stress.ledger.ledger import Terms as Terms
