"""A model's folder into memory: data only, or a refusal that names the way out. Nothing that arrives is executed.

Refused before anything is loaded: code of the folder's own (``auto_map``), attention kernels fetched by name, adapters
(which name another model to load) and weights in any form but safetensors (the others are pickles). Refused after it:
weights that the checkpoint lacks, which transformers would fill with random numbers.

Guarantee: no file of the folder is imported, unpickled or asked about on the terminal, and nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "ModelUnavailable",
    "check_description",
    "check_folder",
    "load_config",
    "load_model",
    "load_tokenizer",
    "missing_weights",
    "other_weights",
]

# said on every load, whatever a later default may be
_DATA_ONLY = {"trust_remote_code": False, "local_files_only": True}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json", "*.h5", "*.msgpack", "*.gguf")
# what transformers adds to a checkpoint by itself and nothing here reads
_UNREAD = "pooler"


class ModelUnavailable(RuntimeError):
    """No source has the model, or what it has is not loaded; the message says why and the way out."""


def check_folder(name: str, path: Path) -> None:
    """Refuse, in milliseconds, what would not be loaded.

    Raises:
        ModelUnavailable: as :func:`check_description`; or no safetensors.
    """
    check_description(name, path)
    if missing := missing_weights(path):
        held = other_weights(path)
        raise ModelUnavailable(
            f"{name} holds no {missing}"
            + (f" (but {', '.join(held[:3])})" if held else "")
            + "; only safetensors weights are loaded, since other formats can run code. Convert it where you trust "
            f"it:\n  {_conversion(_json(name, path / 'config.json'), path if held else name)}\n"
            "and pass the folder ./safe"
        )


def check_description(name: str, path: Path) -> None:
    """Refuse what the files beside the weights rule out; the weights need not be there yet.

    Raises:
        ModelUnavailable: no config.json, or one that is not JSON; code of its own; an adapter.
    """
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise ModelUnavailable(
            f"{path} is a folder but holds no config.json; expected one written by save_pretrained "
            "(config.json, *.safetensors, tokenizer files)"
        )
    if (path / "adapter_config.json").is_file():
        raise ModelUnavailable(
            f"{name} holds an adapter (adapter_config.json), which names another model to load; expected a whole "
            "model. Merge it where you trust it: peft's AutoPeftModelForCausalLM.from_pretrained(...)"
            ".merge_and_unload().save_pretrained(FOLDER), and pass that folder"
        )
    for file in ("config.json", "tokenizer_config.json"):
        for key, value in _entries(_json(name, path / file) if (path / file).is_file() else {}):
            if key == "auto_map" and value:
                raise ModelUnavailable(
                    f"{name}: its {file} names code of its own (auto_map: {_shown(value)}), which is never run. If "
                    f"transformers knows the architecture by itself, delete auto_map from the {file} of a copy and "
                    "pass that folder; otherwise read activations where you trust the code, and pass them with "
                    "--activations"
                )
            if key.endswith("attn_implementation") and any("/" in str(v) for _, v in _entries({"": value})):
                raise ModelUnavailable(
                    f"{name}: its {file} asks for compiled kernels from elsewhere ({key}: {_shown(value)}), which are "
                    f"never fetched; delete {key} from the {file} of a copy and pass that folder"
                )


def other_weights(path: Path) -> list[str]:
    """The names of files with weights that are not safetensors."""
    return sorted(file.name for pattern in _OTHER_WEIGHTS for file in path.glob(pattern))


def missing_weights(path: Path) -> str | None:
    """The first file that the weights need and ``path`` lacks, if any."""
    if not (path / "config.json").is_file():
        return "config.json"
    index = path / _INDEX
    if not index.is_file():
        return None if (path / _WEIGHTS).is_file() else _WEIGHTS
    try:
        shards = sorted(set(_json(path.name, index)["weight_map"].values()))
        return next((shard for shard in shards if Path(shard).name != shard or not (path / shard).is_file()), None)
    except (ModelUnavailable, KeyError, TypeError, AttributeError):
        return f"readable {_INDEX}"


def load_config(name: str, path: Path) -> Any:
    """The configuration, of an architecture that transformers itself knows.

    Raises:
        ModelUnavailable: it does not.
    """
    import transformers

    return _loading(name, "configuration", lambda: transformers.AutoConfig.from_pretrained(path, **_DATA_ONLY))


def load_tokenizer(name: str, path: Path) -> Any:
    """The tokenizer.

    Raises:
        ModelUnavailable: there is none, or it needs code of its own.
    """
    import transformers

    return _loading(name, "tokenizer", lambda: transformers.AutoTokenizer.from_pretrained(path, **_DATA_ONLY))


def load_model(name: str, path: Path, factory: Any) -> Any:
    """The model, by a class of transformers with ``from_pretrained``; every weight from the folder's safetensors.

    Raises:
        ModelUnavailable: damaged files, an architecture unknown to ``factory``, or weights that the folder lacks.
    """
    model, info = _loading(
        name,
        "model",
        lambda: factory.from_pretrained(path, use_safetensors=True, output_loading_info=True, **_DATA_ONLY),
    )
    if absent := sorted(key for key in info["missing_keys"] if _UNREAD not in key.split(".")):
        raise ModelUnavailable(
            f"{name} lacks {len(absent)} weights of {type(model).__name__} ({', '.join(absent[:3])}"
            f"{', ...' if len(absent) > 3 else ''}), which would be random numbers; save it again with save_pretrained "
            "of the class that it was trained with"
        )
    return model


def _loading(name: str, what: str, load: Any) -> Any:
    try:
        return load()
    # whatever a library says of a file that it cannot use; our callers know one error
    except Exception as error:
        told = (str(error).strip() or repr(error)).splitlines()[0][:300]
        raise ModelUnavailable(
            f"the {what} of {name} could not be loaded ({type(error).__name__}: {told}); expected a folder written by "
            "save_pretrained whose architecture this version of transformers knows. Otherwise read activations "
            "elsewhere, and pass them with --activations"
        ) from error


def _json(name: str, file: Path) -> Any:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelUnavailable(
            f"{file.name} of {name} is not JSON ({type(error).__name__}); it is damaged: fetch the model again"
        ) from None
    if not isinstance(read, dict):
        raise ModelUnavailable(
            f"{file.name} of {name} holds no JSON object but a {type(read).__name__}; fetch the model again"
        )
    return read


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    waiting = [value]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            yield from ((str(key), held) for key, held in here.items())
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here


def _conversion(config: Any, source: Path | str) -> str:
    """A line of shell that writes safetensors; a class is named only where it is a plain name."""
    listed = config.get("architectures")
    first = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
    factory = first if first.isidentifier() and first.isascii() else "AutoModel"
    return (
        f'python -c "import transformers as t; s = {str(source)!r}; '
        f"t.{factory}.from_pretrained(s).save_pretrained('safe'); "
        "t.AutoTokenizer.from_pretrained(s).save_pretrained('safe')\""
    )


def _shown(value: Any) -> str:
    """What a file says, short and without control characters: it may come from anywhere."""
    return ascii(value)[:100]
