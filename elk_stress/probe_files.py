"""Probes on disk and on the Hugging Face hub: safetensors for the numbers, JSON for the recipe, never pickle.

==========================  =======================================================================
path                        what is written
==========================  =======================================================================
``name.safetensors``        one file; the JSON record lies in the file's own metadata
anything else: a folder     ``probe.safetensors`` and ``probe.json``; on the hub also ``README.md``
==========================  =======================================================================

The record says ``name`` (registered, or ``direction``, ``layers``, ``flat``: the engine's own), ``recipe`` (its
hyperparameters; recipes within recipes are records of their own), ``site``, ``dim``, ``notes`` and ``package``, whose
code scores. Reading makes numbers and looks names up in the registry; it runs nothing that came with the file. A pickle
is a program that runs when it is read, whoever wrote it: it is refused, by its name or by its first bytes.

File format: https://github.com/huggingface/safetensors (8 bytes of header length, then a JSON header).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elk_stress import registry
from elk_stress.extras import need
from elk_stress.files import replace_bytes
from elk_stress.probe import FittedProbe, Probe, _Direction

__all__ = ["load_probe", "model_card", "pull_probe", "push_probe", "save_probe"]

NUMBERS, RECORD, CARD = "probe.safetensors", "probe.json", "README.md"
_KEY = "elk_stress"
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".bin", ".ckpt")
# pickle protocols 2 to 5 begin so; so does the zip archive in which torch keeps a pickle
_BEGINNINGS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def save_probe(fitted: FittedProbe, path: str | Path) -> Path:
    """Write a probe; returns where.

    Args:
        fitted: its parameters are numpy arrays, its recipe a dataclass of numbers, texts, lists and recipes.
        path: ``*.safetensors`` for one file, else a folder; made if missing, an older probe there is replaced.

    Raises:
        ValueError: a recipe that no file can hold (somebody's function, say), or a name that says pickle.
    """
    from safetensors.numpy import save

    path = Path(path)
    _refuse_pickle_name(path)
    record = _record(fitted)
    # also transposed and read-only ones
    numbers = {name: np.array(value, order="C") for name, value in fitted.parameters.items()}
    text = json.dumps(record, indent=2, sort_keys=True)
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
        ValueError: a pickle; a file without a record; options that the installed recipe does not take.
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
        return _fitted(_parsed(record_file.read_text(), record_file), numbers, record_file)
    numbers, text = _read(path)
    beside = path.with_name(RECORD)
    if text is None and path.name == NUMBERS and beside.is_file():
        text = beside.read_text()
    if text is None:
        raise ValueError(
            f"{path} holds arrays but no record of a probe; expected a file written by FittedProbe.save. For a bare "
            "direction: elk_stress.direction(weight, bias).save(path)"
        )
    return _fitted(_parsed(text, path), numbers, path)


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
        (Path(folder) / CARD).write_text(model_card(fitted, repo_id))
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
    return f"""---
library_name: elk-stress
tags:
- probe
- interpretability
---
# {fitted.name}

{what}

A probe for `elk_stress`: activations in, one score per item out; higher means more strongly positive.

| | |
| --- | --- |
| recipe | `{record["name"]}` of the package `{record["package"]}` |
| reads | {fitted.dim if fitted.dim is not None else "any number of"} features at `{fitted.site or "an unnamed site"}` |
| parameters | {sum(int(v.size) for v in fitted.parameters.values())} numbers |

```python
from elk_stress import FittedProbe

probe = FittedProbe.pull({repo_id!r})
scores = probe.score(activations)  # (n, d) -> (n,), numpy, torch or jax
```

Record:

```json
{json.dumps(record, indent=2, sort_keys=True)}
```
"""


def _record(fitted: FittedProbe) -> dict[str, Any]:
    notes = {str(key): _plain(value, f"note {key!r} of probe {fitted.name!r}") for key, value in fitted.notes.items()}
    return {**_named(fitted.probe), "site": fitted.site, "notes": notes, "dim": fitted.dim}


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
    name = next((name for name, made in _own().items() if type(probe) is made), probe.name)
    return {"name": name, "recipe": recipe, "package": type(probe).__module__.partition(".")[0]}


def _plain(value: Any, what: str) -> Any:
    """JSON for a value; recipes within it become records."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
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
    from elk_stress.tokens import Flat
    from elk_stress.wrapping.layers import Layers

    return {"direction": _Direction, "layers": Layers, "flat": Flat}


def _made(record: Mapping[str, Any]) -> Probe:
    """The recipe of a record.

    Raises:
        UnknownName, ValueError: nobody's name; options that it does not take.
    """
    name, options = record["name"], {key: _recipes(value) for key, value in record["recipe"].items()}
    own = _own().get(name)
    try:
        recipe: Probe = own(**options) if own is not None else registry.load("probes", name, **options)
    except registry.UnknownName as error:
        package = record.get("package") or "an unnamed package"
        raise registry.UnknownName(
            f"{error}. The probe was saved with code of {package}; install the package that registers {name!r}"
        ) from None
    except TypeError as error:
        raise ValueError(f"{error}; the probe was saved by another version of {record.get('package', 'it')}") from None
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


def _fitted(record: Mapping[str, Any], numbers: dict[str, np.ndarray], source: Path) -> FittedProbe:
    try:
        site, notes, dim = record["site"], record["notes"], record.get("dim")
        return FittedProbe(_made(record), numbers, site, notes, dim)
    except registry.UnknownName:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{source} is no record of a probe ({type(error).__name__}: {error}); expected a file written by "
            "FittedProbe.save"
        ) from None


def _parsed(text: str, source: Path) -> Mapping[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON ({error}); expected a file written by FittedProbe.save") from None
    if not isinstance(record, dict):
        raise ValueError(f"{source} holds a {type(record).__name__}; expected a record written by FittedProbe.save")
    return record


def _read(path: Path) -> tuple[dict[str, np.ndarray], str | None]:
    """Arrays and the record of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a probe written by FittedProbe.save")
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(_BEGINNINGS) and start[8:] != b"{":
        raise ValueError(_refusal(path))
    try:
        with safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get(_KEY)  # noqa: SIM118
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors file that numpy can read ({error})") from None


def _refuse_pickle_name(path: Path) -> None:
    if path.suffix.lower() in _PICKLES and not path.is_dir():
        raise ValueError(_refusal(path))


def _refusal(path: Path) -> str:
    return (
        f"{path} is, or may be, a pickle: a program that runs when it is loaded, so it is not. Open it where you trust "
        "it, in the process that made it, and save it as numbers: elk_stress.wrap(the_object).save('probe.safetensors')"
    )
