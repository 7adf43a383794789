"""Probes on disk and on the Hugging Face hub: safetensors for the numbers, JSON for the recipe, never pickle.

==========================  =======================================================================
path                        what is written
==========================  =======================================================================
``name.safetensors``        one file; the JSON record lies in the file's own metadata
anything else: a folder     ``probe.safetensors`` and ``probe.json``; on the hub also ``README.md``
==========================  =======================================================================

The record says ``format``, ``name`` (registered, or ``direction``, ``layers``, ``flat``: the engine's own), ``recipe``
(its hyperparameters; recipes within recipes are records of their own), ``site``, ``dim``, ``notes``, ``package``, whose
code scores, the names of its ``parameters``, and ``digest``, a SHA-256 of all this and of every number. Reading makes
numbers and looks names up in the registry; it runs nothing that came with the file. A pickle is a program that runs
when it is read, whoever wrote it: it is refused, by its name or by its first bytes.

A file is believed in nothing. Its tables lie within it (:mod:`elk_stress.core.tensor_files`); names can be seen and are
short; hyperparameters are of the recipe's own types; parameters are finite, all there, none too many, and of shapes
that score: three rows are, before the probe is handed out. The digest finds accidents (a flipped bit, a file cut and
joined, a record beside other numbers), not forgers. Files of earlier versions have none, and are read without.

File format: https://github.com/huggingface/safetensors (8 bytes of header length, then a JSON header).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from elk_stress.core import registry
from elk_stress.core.extras import need
from elk_stress.core.files import replace_bytes
from elk_stress.core.printable import code, markdown
from elk_stress.core.settings import shown
from elk_stress.core.tensor_files import mapped, parse_json, tensors_of
from elk_stress.probing.probe import FittedProbe, Probe, _Direction

__all__ = ["load_probe", "model_card", "pull_probe", "push_probe", "save_probe"]

NUMBERS, RECORD, CARD = "probe.safetensors", "probe.json", "README.md"
_KEY = "elk_stress"
FORMAT = 1
_ENTRIES = {"format", "name", "recipe", "package", "site", "notes", "dim", "parameters", "digest"}
_LARGEST_RECORD = 100_000_000
_LARGEST_TRIAL = 30_000_000
"""Bytes of a record, and numbers in the activations of a trial, beyond which a file is refused."""
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".bin", ".ckpt")
# pickle protocols 2 to 5 begin so; so does the zip archive in which torch keeps a pickle
_BEGINNINGS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def save_probe(fitted: FittedProbe, path: str | Path) -> Path:
    """Write a probe; returns where.

    Args:
        fitted: its parameters are numpy arrays, its recipe a dataclass of numbers, texts, lists and recipes.
        path: ``*.safetensors`` for one file, else a folder; made if missing, an older probe there is replaced.

    Raises:
        ValueError: a recipe that no file can hold (somebody's function, say), parameters that are no finite numbers,
            or a name that says pickle.
    """
    from safetensors.numpy import save

    path = Path(path)
    _refuse_pickle_name(path)
    # also transposed and read-only ones
    numbers = {name: np.array(value, order="C") for name, value in fitted.parameters.items()}
    _check_numbers(numbers, f"probe {fitted.name!r} cannot be saved")
    record = _record(fitted)
    record["digest"] = _digest(record, numbers)
    text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False)
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, save(numbers, metadata={_KEY: text}))
        return path
    path.mkdir(parents=True, exist_ok=True)
    replace_bytes(path / NUMBERS, save(numbers))
    replace_bytes(path / RECORD, (text + "\n").encode())
    return path


def load_probe(path: str | Path) -> FittedProbe:
    """Read a probe back, from a folder or a file; scores are identical to those saved.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a pickle; a file without a record, of a newer version, damaged, or that lies about itself; options
            that the installed recipe does not take.
        UnknownName: the package that registers the probe is not installed; the message names it.
    """
    path = Path(path)
    _refuse_pickle_name(path)
    if path.is_dir():
        record_file, numbers_file = path / RECORD, path / NUMBERS
        if not record_file.is_file() or not numbers_file.is_file():
            missing = RECORD if not record_file.is_file() else NUMBERS
            pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
            also = f" ({', '.join(pickles)} may be pickles, which are not read: to load one is to run it)"
            raise FileNotFoundError(
                f"{path} holds no {missing}; expected a folder written by FittedProbe.save{also if pickles else ''}"
            )
        numbers, _ = _read(numbers_file)
        return _fitted(_text(record_file), numbers, record_file)
    numbers, text = _read(path)
    beside = path.with_name(RECORD)
    if text is None and path.name == NUMBERS and beside.is_file():
        return _fitted(_text(beside), numbers, beside)
    if text is None:
        raise ValueError(
            f"{path} holds arrays but no record of a probe; expected a file written by FittedProbe.save. For a bare "
            "direction: elk_stress.direction(weight, bias).save(path)"
        )
    return _fitted(text, numbers, path)


def push_probe(
    fitted: FittedProbe,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str = "Upload probe",
) -> str:
    """Upload a probe with a model card to the Hugging Face hub; returns the commit's address.

    Args:
        fitted: the probe.
        repo_id: ``owner/name``; made if missing.
        revision: branch; by default ``main``.
        private: of a repository that is made.
        token: by default the one that the hub's own login keeps.
        message: of the commit.

    Raises:
        ValueError: a probe that cannot be saved; before anything is sent.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses.
        MissingExtra: the extra ``lm`` is not installed.
    """
    import tempfile

    need("lm", "uploading a probe")
    from huggingface_hub import HfApi, constants

    with tempfile.TemporaryDirectory() as folder:
        save_probe(fitted, folder)
        (Path(folder) / CARD).write_text(model_card(fitted, repo_id), encoding="utf-8")
        # the endpoint is read now: the client's default was bound when it was imported
        api = HfApi(endpoint=constants.ENDPOINT, token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            allow_patterns=[NUMBERS, RECORD, CARD],
        )
    return str(done.commit_url)


def pull_probe(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> FittedProbe:
    """Read a probe from the Hugging Face hub, or from the hub's local cache.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; a commit is what to write down where numbers must stay the same.
        token: by default the one that the hub's own login keeps.

    Raises:
        FileNotFoundError: the repository holds no probe.
        ValueError, UnknownName: as :func:`load_probe`.
        huggingface_hub.errors.RepositoryNotFoundError: no such repository, or it is private.
        MissingExtra: the extra ``lm`` is not installed.
    """
    need("lm", "downloading a probe")
    from huggingface_hub import constants, snapshot_download

    folder = snapshot_download(
        repo_id, revision=revision, token=token, endpoint=constants.ENDPOINT, allow_patterns=[NUMBERS, RECORD]
    )
    if not (Path(folder) / RECORD).is_file():
        raise FileNotFoundError(
            f"{repo_id} on the hub holds no {RECORD}; expected a probe uploaded by FittedProbe.push. Of other files "
            "none are read: what may be a pickle runs when it is loaded"
        )
    return load_probe(folder)


def model_card(fitted: FittedProbe, repo_id: str) -> str:
    """The README of a probe on the hub: what it is, what it reads, how to load it."""
    record = _record(fitted)
    what = (type(fitted.probe).__doc__ or "").strip().split("\n", 1)[0]
    width = fitted.dim if fitted.dim is not None else "any number of"
    # the same text to who reads JSON, and no tag to who does not know that this is a code block
    escaped = "\\u003c"
    shown = json.dumps(record, indent=2, sort_keys=True, allow_nan=False)
    return f"""---
library_name: elk-stress
tags:
- probe
- interpretability
---
# {markdown(fitted.name)}

{what}

A probe for `elk_stress`: activations in, one score per item out; higher means more strongly positive.

| | |
| --- | --- |
| recipe | {code(record["name"])} of the package {code(record["package"])} |
| reads | {width} features at {code(fitted.site or "an unnamed site")} |
| parameters | {sum(int(v.size) for v in fitted.parameters.values())} numbers |

```python
from elk_stress import FittedProbe

probe = FittedProbe.pull({repo_id!r})
scores = probe.score(activations)  # (n, d) -> (n,), numpy, torch or jax
```

Record:

```json
{shown.replace("<", escaped)}
```
"""


def _record(fitted: FittedProbe) -> dict[str, Any]:
    notes = {
        str(key): _finite(_plain(value, f"note {key!r} of probe {fitted.name!r}"))
        for key, value in fitted.notes.items()
    }
    about = {"site": fitted.site, "notes": notes, "dim": fitted.dim, "parameters": sorted(fitted.parameters)}
    return {"format": FORMAT, **_named(fitted.probe), **about}


def _finite(value: Any) -> Any:
    """A note as JSON can say it: what is not finite is not known."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digest(record: Mapping[str, Any], numbers: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of a record, without its digest, and of every parameter: name, type, shape, bytes."""
    told = {key: value for key, value in record.items() if key != "digest"}
    found = hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(numbers):
        value = np.asarray(numbers[name], order="C")
        found.update(json.dumps([name, value.dtype.str, value.shape]).encode())
        found.update(value.tobytes())
    return found.hexdigest()


def _check_numbers(numbers: Mapping[str, np.ndarray], where: str) -> None:
    for name, value in numbers.items():
        if value.dtype.kind not in "biuf":
            raise ValueError(f"{where}: parameter {name!r} holds {value.dtype}; expected real numbers")
        bad = int((~np.isfinite(value)).sum())
        if bad:
            raise ValueError(
                f"{where}: {bad} of {value.size} numbers of parameter {name!r} are not finite; fit the probe again, on "
                "activations that are"
            )


def _named(probe: Probe) -> dict[str, Any]:
    """Name, package and hyperparameters of a recipe."""
    reason = getattr(probe, "unsaveable", None)
    if reason:
        raise ValueError(f"probe {probe.name!r} cannot be saved: {reason}")
    if not is_dataclass(probe):
        raise ValueError(f"probe {probe.name!r} cannot be saved: its recipe {type(probe).__name__} is no dataclass")
    recipe = {
        f.name: _plain(getattr(probe, f.name), f"field {f.name!r} of probe {probe.name!r}")
        for f in fields(probe)
        if f.init
    }
    _check_options(type(probe), {f.name: getattr(probe, f.name) for f in fields(probe) if f.init}, probe.name)
    name = next((name for name, made in _own().items() if type(probe) is made), probe.name)
    return {"name": name, "recipe": recipe, "package": type(probe).__module__.partition(".")[0]}


def _plain(value: Any, what: str) -> Any:
    """JSON for a value; recipes within it become records."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not what.startswith("note") and not math.isfinite(value):
            raise ValueError(f"{what} is {value}, which a file cannot hold; expected finite numbers")
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v, what) for v in value]
    if isinstance(value, np.ndarray) and value.size <= 10_000 and value.dtype.kind in "biuf":
        return value.tolist()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(v, what) for key, v in value.items()}
    if isinstance(value, Probe):
        return {"probe": _named(value)}
    if callable(value):
        raise ValueError(
            f"{what} is somebody's code, which cannot be saved as numbers, and to load code is to run it; keep the "
            "object with its own library and wrap it again (elk_stress.wrap)"
        )
    raise ValueError(
        f"{what} is a {type(value).__name__}, which a file cannot hold; expected numbers, texts, lists or recipes"
    )


def _own() -> dict[str, Any]:
    """Recipes that are the engine's own and not registered."""
    from elk_stress.probing.multi_read import Flat
    from elk_stress.probing.wrapping.layers import Layers

    return {"direction": _Direction, "layers": Layers, "flat": Flat}


def _made(record: Any) -> Probe:
    """The recipe of a record.

    Raises:
        UnknownName, ValueError: nobody's name; options that it does not take.
    """
    name, package = record["name"], record.get("package", "")
    if not isinstance(name, str) or not isinstance(package, str) or not isinstance(record["recipe"], dict):
        raise TypeError("its name and package are texts, its recipe a table of hyperparameters")
    by = package[:100] if package.isidentifier() else "an unnamed package"
    options = {key: _recipes(value) for key, value in record["recipe"].items()}
    try:
        own = _own().get(name)
        _check_options(own if own is not None else registry.find("probes", name), options, name)
        recipe: Probe = own(**options) if own is not None else registry.load("probes", name, **options)
        recipe.name, recipe.traits  # noqa: B018  (they may be worked out from the options)
    except registry.UnknownName as error:
        raise registry.UnknownName(
            f"{error}. The probe was saved with code of {by}; install the package that registers {name[:100]!r}"
        ) from None
    except TypeError as error:
        raise ValueError(f"{error}; the probe was saved by another version of {by}") from None
    return recipe


def _recipes(value: Any) -> Any:
    if isinstance(value, list):
        return [_recipes(v) for v in value]
    if isinstance(value, dict):
        nested = value.get("probe")
        if set(value) == {"probe"} and isinstance(nested, dict):
            return _made(nested)
        return {key: _recipes(v) for key, v in value.items()}
    return value


def _check_options(recipe: Any, options: Mapping[str, Any], name: str) -> None:
    """Hyperparameters are of the types that the recipe's fields declare; what they declare beyond JSON is theirs.

    Raises:
        ValueError: one that is not.
    """
    if not is_dataclass(recipe):
        return
    try:
        declared = get_type_hints(recipe)
    except (NameError, TypeError):
        return
    for key, value in options.items():
        if key in declared and not _is_a(value, declared[key]):
            said = str(declared[key]) if not isinstance(declared[key], type) else declared[key].__name__
            raise ValueError(f"field {key!r} of probe {name[:100]!r} is {said}, got {str(value)[:100]!r}")


def _is_a(value: Any, declared: Any) -> bool:
    origin, inner = get_origin(declared), get_args(declared)
    if origin in (Union, types.UnionType):
        return any(_is_a(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(inner) == 2 and inner[1] is Ellipsis:
            return all(_is_a(v, inner[0]) for v in value)
        return len(value) == len(inner) and all(map(_is_a, value, inner))
    if declared in (int, float) and isinstance(value, (int, float, np.number)):
        # Python counts with true and false, a hyperparameter does not
        return not isinstance(value, bool) and (declared is float or isinstance(value, (int, np.integer)))
    if declared in (int, float, bool, str, type(None), Probe) or origin is tuple:
        return isinstance(value, (declared, np.bool_) if declared is bool else origin or declared)
    return True


def _fitted(text: str, numbers: dict[str, np.ndarray], source: Path) -> FittedProbe:
    """A probe of a record and its numbers, after both were checked."""
    record = parse_json(text, source)
    if not isinstance(record, dict):
        raise ValueError(f"{source} holds a {type(record).__name__}; expected a record written by FittedProbe.save")
    version = record.get("format", 0)
    if type(version) is not int or version < 0:
        raise ValueError(f"{source} is no record of a probe: its format is a whole number, got {str(version)[:40]!r}")
    if version > FORMAT:
        raise ValueError(
            f"{source} was written in format {version} by a newer elk_stress; this one reads up to {FORMAT}: upgrade "
            "elk_stress"
        )
    # the name of an entry may be what was damaged, the digest's own among them
    if version and (strange := sorted(set(record) - _ENTRIES)):
        raise ValueError(f"{source} is no record of a probe: it has entries of other names, {shown(strange)}")
    _check_numbers(numbers, str(source))
    try:
        site, notes, dim = record["site"], record["notes"], record.get("dim")
        if not isinstance(site, str) or not isinstance(notes, dict):
            raise TypeError("its site is a text and its notes a table")
        if dim is not None and (type(dim) is not int or not 1 <= dim <= _LARGEST_TRIAL // 3):
            raise TypeError(f"its width is a number of features, got {str(dim)[:40]}")
        names = record.get("parameters")
        if names is not None and names != sorted(numbers):
            raise ValueError(
                f"the record says that its parameters are {str(names)[:200]}, and it holds {str(sorted(numbers))[:200]}"
            )
        fitted = FittedProbe(_made(record), numbers, site, notes, dim)
    except registry.UnknownName:
        raise
    except RecursionError:
        raise ValueError(f"{source} is no record of a probe: its recipe is nested too deeply") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
        raise ValueError(
            f"{source} is no record of a probe ({type(error).__name__}: {error}); expected a file written by "
            "FittedProbe.save"
        ) from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    _try(fitted, names is not None, source)
    if "digest" in record and record["digest"] != _digest(record, numbers):
        raise ValueError(
            f"{source} was changed after it was saved: its digest does not hold. Take a copy that is whole, or save "
            f"the probe again; to keep a change made by hand, take the digest out of the record"
        )
    return fitted


class _Watched(Mapping[str, Any]):
    """Parameters that know which of them were read."""

    def __init__(self, numbers: Mapping[str, np.ndarray]) -> None:
        self.numbers, self.read = numbers, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self.numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


def _try(fitted: FittedProbe, listed: bool, source: Path) -> None:
    """Score three rows, of the width that the probe says, or else of any width that its parameters have.

    Raises:
        ValueError: no such rows can be scored, scores that are not finite or not one a row, or a parameter that
            nothing reads, where the record does not list it.
    """
    why = "it has no parameters that say how wide its activations are"
    for shape in _shapes(fitted):
        rows = np.random.default_rng(np.random.SeedSequence(0)).standard_normal(shape)
        watched = _Watched(fitted.parameters)
        given = (rows, None) if fitted.traits.tokens else (rows,)
        try:
            with np.errstate(all="ignore"):
                scores = np.asarray(fitted.probe.score(np, watched, *given))
                steep = getattr(fitted.probe, "lipschitz", None)
                if steep is not None:
                    steep(watched, np.eye(shape[-1], 1))
        except Exception as error:
            # of arrays with shapes of their author's choice
            why = f"parameter {error} is missing" if isinstance(error, KeyError) else str(error)
            continue
        if scores.shape != (3,) or scores.dtype.kind != "f" or not np.isfinite(scores).all():
            why = f"three rows gave scores of shape {scores.shape}, or some that are not finite"
            continue
        unread = sorted(set(fitted.parameters) - watched.read)
        if unread and not listed:
            raise ValueError(f"{source} holds parameters that {fitted.name!r} does not have: {', '.join(unread)}")
        return
    raise ValueError(
        f"{source} does not hold the parameters of {fitted.name!r} in shapes that score activations "
        f"({' '.join(why.split())[:300]}); save the probe again where it was fitted"
    )


def _shapes(fitted: FittedProbe) -> Iterator[tuple[int, ...]]:
    sizes = sorted({1, 2, *(n for value in fitted.parameters.values() for n in value.shape)} - {0})
    widths = sizes if fitted.dim is None else [fitted.dim]
    counts = sizes if fitted.traits.tokens else [0]
    # each size that is there is tried with each: of a file's own making, hence not all of them
    for width, tokens in itertools.islice(itertools.product(widths, counts), 400):
        if 3 * width * max(tokens, 1) <= _LARGEST_TRIAL:
            yield (3, tokens, width) if tokens else (3, width)


def _text(path: Path) -> str:
    if path.stat().st_size > _LARGEST_RECORD:
        raise ValueError(f"{path} is larger than a record of a probe, {_LARGEST_RECORD} bytes at most")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: byte {error.start} is no UTF-8") from None


def _read(path: Path) -> tuple[dict[str, np.ndarray], str | None]:
    """Arrays and the record of a safetensors file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a probe written by FittedProbe.save")
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(_BEGINNINGS) and start[8:] != b"{":
        raise ValueError(_refusal(path))
    tensors, metadata = tensors_of(path)
    return {name: np.array(mapped(path, name, tensor)) for name, tensor in tensors.items()}, metadata.get(_KEY)


def _refuse_pickle_name(path: Path) -> None:
    if path.suffix.lower() in _PICKLES and not path.is_dir():
        raise ValueError(_refusal(path))


def _refusal(path: Path) -> str:
    return (
        f"{path} is, or may be, a pickle: a program that runs when it is loaded, so it is not. Open it where you trust "
        "it, in the process that made it, and save it as numbers: elk_stress.wrap(the_object).save('probe.safetensors')"
    )
