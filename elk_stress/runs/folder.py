"""The folder of a run: ``result.json``, ``bits.png``, ``survival.png``, ``best_of_n.png``, ``report.md``.

Every file is written beside itself and then renamed into place, so a reader never sees half of one and a crash leaves
the previous one. ``result.json`` comes first: nothing that fails to draw can lose a number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from elk_stress.core.files import replace_file as replace_file

if TYPE_CHECKING:
    from elk_stress.runs.stress import RunResult

__all__ = ["NEEDED_BYTES", "UnusableFolder", "check_folder", "replace_file", "write_folder", "write_result"]

NEEDED_BYTES = 64 * 2**20
"""Free space demanded before the work: result.json of a full run is about 10 MB, its pieces 20 MB, figures 1 MB."""


class UnusableFolder(OSError):
    """The output folder cannot be written; says why and the way out."""


def check_folder(folder: Path, needed: int = NEEDED_BYTES) -> Path:
    """Make ``folder`` if missing and prove that it can be written and has room, before any long work.

    Raises:
        UnusableFolder: a file is in the way, it is read-only, or the disk is full.
    """
    way_out = "choose another folder with --out (out=)"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UnusableFolder(f"the output folder {folder} cannot be made: a file is in the way; {way_out}") from None
    except OSError as error:
        raise UnusableFolder(f"the output folder {folder} cannot be made: {error.strerror}; {way_out}") from None
    try:
        replace_file(folder / "writable", lambda path: path.write_bytes(b"\0" * 65536))
        (folder / "writable").unlink()
    except OSError as error:
        raise UnusableFolder(f"the output folder {folder} cannot be written: {error.strerror}; {way_out}") from None
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UnusableFolder(
            f"the output folder {folder} has {free / 2**20:.0f} MiB free and a run needs {needed / 2**20:.0f}; "
            f"make room, or {way_out}"
        )
    return folder


def write_result(run: RunResult, folder: Path) -> Path:
    """``result.json`` alone, atomically: after every finished probe."""
    path = folder / "result.json"
    text = json.dumps(run.to_json(), allow_nan=False, separators=(",", ":"))
    replace_file(path, lambda part: part.write_text(text + "\n"))
    return path


def write_folder(run: RunResult, folder: Path) -> list[Path]:
    """Everything; returns the files written. Figures need at least one finished probe."""
    written = [write_result(run, folder)]
    if run.results:
        from elk_stress.report import overview, plots

        for name, figure in (
            ("bits.png", overview.bits(run.results)),
            ("survival.png", plots.survival(run.results)),
            ("best_of_n.png", plots.best_of_n(run.results)),
            ("incidental.png", plots.incidental(run.results)),
        ):
            if figure is None:
                # a figure of an earlier run must not stand beside this run's numbers
                (folder / name).unlink(missing_ok=True)
                continue
            replace_file(folder / name, lambda part, figure=figure: plots.save(figure, part))  # type: ignore[misc]
            written.append(folder / name)
    from elk_stress.report.markdown import report

    text = report(run, [path.name for path in written])
    replace_file(folder / "report.md", lambda part: part.write_text(text, encoding="utf-8"))
    return [*written, folder / "report.md"]
