"""The file of a ledger of bits: its terms (a text) and every charge, in an SQLite database (WAL) that only grows.

Nothing acknowledged is lost: a charge is acknowledged when its transaction is committed with ``synchronous=FULL``, so a
process killed at any moment leaves all its acknowledged charges and never half of one. Writers take the write lock
*before* they read (``BEGIN IMMEDIATE``), so that check and charge are one step across processes. A new file is built
under another name and linked into place, hence is never seen half made, and of many creators exactly one wins.

Append-only in two ways. Triggers refuse UPDATE, DELETE and any INSERT that is not the next row, which also stops
``INSERT OR REPLACE`` (it deletes without firing delete triggers). And rows are chained: with ``c_i`` the content of row
i as canonical JSON, ``h_0 = sha256(terms)``, ``h_i = sha256(h_{i-1} + c_i)``; changing, dropping or inserting a row
breaks every hash after it. Cut-off *last* rows leave a shorter chain that is whole: only a remembered ``h_n`` shows it.
The chain finds accidents and careless edits; whoever rewrites all of it is not stopped.

Opening checks both ends, the terms and the last row, whatever lies between. Sums come from rows alone, each of which is
held against the chain when it is first read: a connection reads all rows once, before its first charge or balance, and
later those that are new. Nothing is said, and nothing charged, on a chain that does not hold.

SQLite from 3.7.0 to 3.51.2 can lose commits when a checkpoint starts while another process resets the WAL
(https://sqlite.org/wal.html#walresetbug). Automatic checkpoints are therefore off; ours hold the write lock (mode
TRUNCATE), during which no other process can reset anything.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = [
    "RECORDED",
    "Charge",
    "LedgerDamaged",
    "LedgerError",
    "Store",
    "View",
    "append",
    "canonical",
    "digest",
]

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x454C4B4C  # "ELKL": tells a ledger from any other database
_CHECKPOINT_EVERY = 256  # charges; keeps the WAL near 4 MB

RECORDED = "for the record"
"""How the detail of queries begins whose answers shaped no move; all others did, those of older ledgers included."""


class LedgerError(RuntimeError):
    """The ledger's file cannot be used; says why, that nothing was charged, and the way out."""


class LedgerDamaged(LedgerError):
    """The file was altered or damaged: the chain of hashes, the running sums or the database itself do not hold."""


@dataclass(frozen=True)
class Charge:
    """One row, as acknowledged.

    Attributes:
        id: 1, 2, 3, ... without gaps.
        account: ``selection``, ``kl``, ``mean_shift`` or ``queries``.
        lineage: what the charge is about; amounts add within one.
        amount: in the account's unit.
        spent: the account's sum on this lineage, this charge included.
        detail: what was done, e.g. ``kept 1 of 16``.
        note: the user's own words.
        time: UTC; for the reader only, nothing is decided by it.
        previous, hash: links of the chain.
    """

    id: int
    account: str
    lineage: str
    amount: float
    spent: float
    detail: str
    note: str
    time: str
    previous: str
    hash: str


_COLUMNS = ", ".join(f.name for f in fields(Charge))
_SCHEMA = (
    "CREATE TABLE terms (one INTEGER PRIMARY KEY CHECK (one = 1), record TEXT NOT NULL, hash TEXT NOT NULL)",
    """CREATE TABLE charges (
        id INTEGER PRIMARY KEY, account TEXT NOT NULL, lineage TEXT NOT NULL, amount REAL NOT NULL CHECK (amount >= 0),
        spent REAL NOT NULL CHECK (spent >= amount), detail TEXT NOT NULL, note TEXT NOT NULL, time TEXT NOT NULL,
        previous TEXT NOT NULL UNIQUE, hash TEXT NOT NULL UNIQUE)""",
    """CREATE TRIGGER terms_once BEFORE INSERT ON terms WHEN EXISTS (SELECT 1 FROM terms)
        BEGIN SELECT RAISE(ABORT, 'a ledger is append-only: its terms are fixed'); END""",
    """CREATE TRIGGER charges_in_order BEFORE INSERT ON charges
        WHEN NEW.id IS NOT (SELECT coalesce(max(id), 0) + 1 FROM charges) OR NEW.previous IS NOT
        coalesce((SELECT hash FROM charges ORDER BY id DESC LIMIT 1), (SELECT hash FROM terms))
        BEGIN SELECT RAISE(ABORT, 'a ledger is append-only: this is not its next charge'); END""",
    *(
        f"""CREATE TRIGGER {table}_{action} BEFORE {action.upper()} ON {table}
        BEGIN SELECT RAISE(ABORT, 'a ledger is append-only: {action} refused'); END"""
        for table in ("terms", "charges")
        for action in ("update", "delete")
    ),
)


def canonical(value: object) -> str:
    """JSON of which there is one only: sorted keys, no spaces, ASCII; no NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class View:
    """What the rows up to one of them say, within a transaction.

    Attributes:
        path, connection: the ledger's.
        last, head: number and hash of the row; 0 and the terms' hash before the first.
        sums: what was spent, by account and lineage.
        designed: lineages whose moves were shaped by answers to queries.
    """

    path: Path
    connection: sqlite3.Connection
    last: int
    head: str
    sums: dict[tuple[str, str], float] = field(default_factory=dict)
    designed: set[str] = field(default_factory=set)

    def spent(self, account: str, lineage: str) -> float:
        """The account's sum on one lineage; 0 before its first charge."""
        return self.sums.get((str(account), lineage), 0.0)

    def lineages(self) -> list[str]:
        """Lineages in the order of their first charge."""
        return list(dict.fromkeys(lineage for _, lineage in self.sums))

    def add(self, charge: Charge) -> None:
        """The next row, once it is held against the chain and the sums.

        Raises:
            LedgerDamaged: it is not the next, or not as it was written.
        """
        if charge.id != self.last + 1 or charge.previous != self.head:
            raise LedgerDamaged(f"{self.path}: a charge before number {charge.id} is missing; restore a copy")
        account = charge.account, charge.lineage
        sound = _sound(charge) and charge.hash == _link(charge) and charge.spent == self.spent(*account) + charge.amount
        if not sound:
            raise LedgerDamaged(f"{self.path}: charge {charge.id} was altered; restore a copy")
        self.last, self.head, self.sums[account] = charge.id, charge.hash, charge.spent
        if charge.account == "queries" and not charge.detail.startswith(RECORDED):
            self.designed.add(charge.lineage)


class Store:
    """One open file. Threads share it under a lock; a forked child opens its own connection.

    Raises:
        LedgerError: missing, unreadable, locked for longer than ``timeout`` seconds, or no ledger of this version.
    """

    def __init__(self, path: Path, *, timeout: float, readonly: bool = False) -> None:
        self.path, self.timeout, self.readonly = path, timeout, readonly
        self._open: sqlite3.Connection | None = None
        self._owner, self._lock = os.getpid(), threading.RLock()
        # connections of the parent process: using or closing them after a fork would release its locks
        self._inherited: list[sqlite3.Connection | None] = []
        self._seen: View | None = None
        try:
            with self._transaction("BEGIN") as connection:
                self.record = _checked_ends(path, connection)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def create(path: Path, record: str) -> None:
        """Make the file, whole at once; leave it alone if another process was faster.

        Raises:
            LedgerError: the folder is missing or cannot be written, or knows neither hard links nor shared memory.
        """
        made = path.parent / f".{path.name}.{uuid.uuid4().hex}.new"
        try:
            os.close(os.open(made, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
            try:
                _build(made, record)
                with suppress(FileExistsError):
                    os.link(made, path)
            finally:
                os.unlink(made)
        except FileNotFoundError:
            raise LedgerError(f"no folder {path.parent} to keep the ledger {path.name} in; make it first") from None
        except (OSError, ValueError, sqlite3.Error) as error:
            raise LedgerError(
                f"cannot make a ledger at {path} ({error}); choose a folder on a local disk that you can write"
            ) from error

    @contextmanager
    def writing(self) -> Iterator[View]:
        """A transaction that nobody else can write beside; committed, durably, when the block ends well."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            view = self._view(connection)
            yield view
        # only what is committed was seen
        self._seen = view
        if view.last % _CHECKPOINT_EVERY == 0:
            # what is committed is committed: a checkpoint that fails now is made later
            with suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextmanager
    def reading(self) -> Iterator[View]:
        """One consistent view."""
        with self._transaction("BEGIN") as connection:
            self._seen = self._view(connection)
            yield self._seen

    def charges(self) -> list[Charge]:
        """All charges in order, each held against the chain."""
        with self._transaction("BEGIN") as connection:
            return _all(self.path, connection)[0]

    def verify(self) -> tuple[list[Charge], str]:
        """All charges and the last hash, after every row, sum, trigger and page was checked.

        Raises:
            LedgerDamaged: the first thing that does not hold.
        """
        with self._transaction("BEGIN") as connection:
            pages = [row[0] for row in connection.execute("PRAGMA integrity_check(1)")]
            if pages != ["ok"]:
                raise LedgerDamaged(f"the ledger {self.path} is damaged ({pages[0]}); restore a copy")
            # an index that is not used any more; ledgers of earlier versions have it
            if _schema(connection) - {_LATEST} != _expected_schema():
                raise LedgerDamaged(
                    f"the ledger {self.path} lost or changed its tables or the triggers that keep it append-only; "
                    "restore a copy"
                )
            charges, view = _all(self.path, connection)
        return charges, view.head

    def close(self) -> None:
        """Close the connection; the last one to close folds the WAL into the file."""
        with self._lock:
            if self._owner != os.getpid():
                self._inherited.append(self._open)
            elif self._open is not None:
                self._open.close()
            self._open = None

    def _view(self, connection: sqlite3.Connection) -> View:
        """What was seen before, and every row since."""
        seen = self._seen
        if seen is None:
            return _all(self.path, connection)[1]
        if seen.last and connection.execute("SELECT hash FROM charges WHERE id = ?", (seen.last,)).fetchone() != (
            seen.head,
        ):
            raise LedgerDamaged(
                f"the ledger {self.path} was rewritten while it was open: charge {seen.last} is another; restore a copy"
            )
        view = replace(seen, connection=connection, sums=dict(seen.sums), designed=set(seen.designed))
        _follow(view)
        return view

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        if self._owner != os.getpid():
            self._inherited.append(self._open)
            self._open, self._owner, self._lock = None, os.getpid(), threading.RLock()
        with self._lock:
            try:
                if self._open is None:
                    self._open = self._connect()
                connection = self._open
                connection.execute(begin)
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._told(error) from error

    def _connect(self) -> sqlite3.Connection:
        try:
            if self.path.is_dir():
                raise LedgerError(f"{self.path} is a folder and no ledger; name a file in it")
            if not self.path.is_file():
                raise LedgerError(f"there is no ledger at {self.path}; give the terms with which one is to be made")
        except OSError as error:
            raise LedgerError(
                f"the ledger {self.path} cannot be looked at ({error.strerror}); choose another"
            ) from None
        where = self.path.absolute().as_uri()
        mode = "ro" if self.readonly else "rw"
        if self.readonly and not os.access(self.path.parent, os.W_OK) and not _pending(self.path):
            # without a WAL the file is complete, and where nobody can write nobody can change it
            mode = "ro&immutable=1"
        connection = sqlite3.connect(
            f"{where}?mode={mode}", uri=True, timeout=self.timeout, isolation_level=None, check_same_thread=False
        )
        try:
            found = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
            if found[0] != _APPLICATION_ID:
                raise LedgerError(
                    f"{self.path} is a database but no ledger of bits; choose another file, or restore a copy of what "
                    "it was"
                )
            if found[1] != SCHEMA_VERSION:
                raise LedgerError(
                    f"the ledger {self.path} has schema version {found[1]}, this elk_stress reads version "
                    f"{SCHEMA_VERSION}; use the elk_stress that wrote it, or a newer one"
                )
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            if not self.readonly:
                # a copy that SQLite vacuumed has another
                connection.execute("PRAGMA journal_mode = WAL").fetchall()
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA fullfsync = ON")
            connection.execute("PRAGMA wal_autocheckpoint = 0").fetchall()
        except BaseException:
            connection.close()
            raise
        return connection

    def _told(self, error: sqlite3.Error) -> LedgerError:
        """What SQLite says, as what it means here and the way out."""
        code = str(getattr(error, "sqlite_errorname", ""))
        told = (
            (
                "SQLITE_BUSY",
                LedgerError,
                f"is locked by another process for longer than {self.timeout:g} s; end that process or "
                "give a longer timeout",
            ),
            ("SQLITE_READONLY", LedgerError, "cannot be written; make the file and its folder writable"),
            ("SQLITE_CANTOPEN", LedgerError, "cannot be opened; make the file readable and its folder writable"),
            ("SQLITE_FULL", LedgerError, "cannot grow, since the disk is full; make room"),
            ("SQLITE_IOERR", LedgerError, "cannot be read or written by the system; put it on a local disk that works"),
            ("SQLITE_NOTADB", LedgerDamaged, "is no ledger, or its first page is damaged; restore a copy"),
            ("SQLITE_CORRUPT", LedgerDamaged, "is damaged; restore a copy"),
            # no such table or column, and text that is none, of which SQLite says no more
            ("", LedgerDamaged, "is damaged or not as it was made; restore a copy"),
        )
        kind, meaning = next((kind, meaning) for start, kind, meaning in told if code.startswith(start))
        return kind(f"the ledger {self.path} {meaning}. Nothing was charged ({code or type(error).__name__}: {error})")


def append(view: View, account: str, lineage: str, amount: float, *, detail: str = "", note: str = "") -> Charge:
    """Write the next charge, inside a transaction of :meth:`Store.writing`; it counts once that is committed.

    Raises:
        ValueError: a sum beyond what a float64 holds.
    """
    # adding 0.0 turns -0.0, which SQLite does not keep, into 0.0
    amount = float(amount) + 0.0
    total = view.spent(account, lineage) + amount
    if not math.isfinite(total):
        raise ValueError(f"{account}: {amount:g} more than was spent is no finite number; nothing was charged")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    charge = Charge(view.last + 1, str(account), lineage, amount, total, detail, note, now, view.head, "")
    charge = replace(charge, hash=_link(charge))
    view.connection.execute(f"INSERT INTO charges ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)", astuple(charge))
    view.add(charge)
    return charge


def _build(path: Path, record: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise OSError(f"its file system cannot share memory between processes, journal mode {mode}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute("INSERT INTO terms VALUES (1, ?, ?)", (record, digest(record)))
    finally:
        connection.close()


def _checked_ends(path: Path, connection: sqlite3.Connection) -> str:
    """The terms, after they and the last row were held against their hashes."""
    row = connection.execute("SELECT record, hash FROM terms").fetchone()
    if row is None:
        raise LedgerDamaged(f"the ledger {path} has lost its terms; restore a copy")
    record, mark = row
    if not isinstance(record, str) or mark != digest(record):
        raise LedgerDamaged(f"the terms of the ledger {path} were altered; restore a copy")
    last = connection.execute(f"SELECT {_COLUMNS} FROM charges ORDER BY id DESC LIMIT 1").fetchone()
    charge = None if last is None else Charge(*last)
    if charge is not None:
        found = connection.execute("SELECT hash FROM charges WHERE id = ?", (charge.id - 1,)).fetchone()
        before = mark if charge.id == 1 else found[0] if found is not None else None
        if charge.previous != before:
            raise LedgerDamaged(f"{path}: a charge before number {charge.id} is missing; restore a copy")
        if not _sound(charge) or charge.hash != _link(charge):
            raise LedgerDamaged(f"{path}: charge {charge.id} was altered; restore a copy")
    _nothing_follows(path, connection, mark if charge is None else charge.hash)
    return record


def _nothing_follows(path: Path, connection: sqlite3.Connection, head: str) -> None:
    # the index of `previous` is another part of the file: it knows a row that the table has lost
    following = "SELECT count(*) FROM charges INDEXED BY sqlite_autoindex_charges_1 WHERE previous = ?"
    if connection.execute(following, (head,)).fetchone() != (0,):
        raise LedgerDamaged(f"{path}: the last charges are missing; restore a copy")


def _all(path: Path, connection: sqlite3.Connection) -> tuple[list[Charge], View]:
    """Every charge, from the terms on."""
    view = View(path, connection, 0, digest(_checked_ends(path, connection)))
    return _follow(view), view


def _follow(view: View) -> list[Charge]:
    """Add the rows that come after a view."""
    found, first = [], view.last + 1 if view.last else -(2**63)
    for row in view.connection.execute(f"SELECT {_COLUMNS} FROM charges WHERE id >= ? ORDER BY id", (first,)):
        charge = Charge(*row)
        view.add(charge)
        found.append(charge)
    _nothing_follows(view.path, view.connection, view.head)
    return found


def _sound(charge: Charge) -> bool:
    """Whether every value is of the kind that this package writes: a row written by somebody else may hold anything."""
    texts = (charge.account, charge.lineage, charge.detail, charge.note, charge.time, charge.previous, charge.hash)
    numbers = (charge.amount, charge.spent)
    return (
        type(charge.id) is int
        and all(type(text) is str for text in texts)
        and all(type(x) is float and 0 <= x < math.inf for x in numbers)
        and charge.account in ("selection", "kl", "mean_shift", "queries")
        and bool(charge.lineage.strip())
        and (charge.account != "queries" or charge.amount.is_integer())
    )


def _link(charge: Charge) -> str:
    """The hash of a row: of the one before it, and of its content."""
    content: list[Any] = [getattr(charge, f.name) for f in fields(Charge) if f.name not in ("previous", "hash")]
    return digest(charge.previous + canonical(content))


def _schema(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    return set(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


_LATEST = ("latest", "CREATE INDEX latest ON charges (account, lineage, id)")


def _expected_schema() -> set[tuple[str, str]]:
    connection = sqlite3.connect(":memory:")
    try:
        for statement in _SCHEMA:
            connection.execute(statement)
        return _schema(connection)
    finally:
        connection.close()


def _pending(path: Path) -> bool:
    wal = path.with_name(path.name + "-wal")
    return wal.exists() and wal.stat().st_size > 0
