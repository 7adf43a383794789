"""Model folders that try to run something, or lack something; each is refused, and the way out that it names works."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file

from elk_stress.models import loading
from elk_stress.models.language_model import LanguageModel
from elk_stress.models.sources import ModelUnavailable, resolve

TEXT = ["the red cat"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.causal().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What hostile code would leave: a file, an import, a question to the user. Empty is right."""
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": asked.append(prompt) or "y")
    monkeypatch.setenv("ELK_TRACE", str(tmp_path / "trace"))
    return asked


def edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def load(folder: Path) -> LanguageModel:
    return LanguageModel(folder, cache=None)


def ran(tmp_path: Path) -> bool:
    return (tmp_path / "trace").exists() or "modeling_evil" in " ".join(sys.modules)


CODE = "import os\nopen(os.environ['ELK_TRACE'], 'w').close()\nEvil = None\n"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["llama", "evil"])
@pytest.mark.parametrize("nested", [False, True])
def test_code_of_a_folder_is_refused_by_name_and_never_run(
    folder: Path, tmp_path: Path, traces: list[str], file: str, kind: str, nested: bool
) -> None:
    (folder / "modeling_evil.py").write_text(CODE)
    names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_evil.Evil")
    names["AutoTokenizer"] = ["modeling_evil.Evil", None]  # type: ignore[assignment]
    edit(folder / "config.json", model_type=kind)
    edit(folder / file, **({"text_config": {"auto_map": names}} if nested else {"auto_map": names}))
    with pytest.raises(ModelUnavailable, match=rf"its {file} names code of its own .*modeling_evil.*never run"):
        load(folder)
    assert (traces, ran(tmp_path)) == ([], False)


def test_every_load_says_that_nothing_is_run(folder: Path, tmp_path: Path, traces: list[str]) -> None:
    """The refusal above is not what keeps the code from running."""
    import transformers

    (folder / "modeling_evil.py").write_text(CODE)
    names: dict[str, Any] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_evil.Evil")
    edit(folder / "config.json", model_type="evil", auto_map=names)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]})
    for load_part in (
        lambda: loading.load_config("evil", folder),
        lambda: loading.load_tokenizer("evil", folder),
        lambda: loading.load_model("evil", folder, transformers.AutoModelForCausalLM),
    ):
        with suppress(ModelUnavailable):
            load_part()
        assert (traces, ran(tmp_path)) == ([], False)


def test_refused_code_can_be_left_out_as_the_refusal_says(folder: Path) -> None:
    expected = load(folder).read(TEXT, ["layers.1"])["layers.1"]
    edit(folder / "config.json", auto_map={"AutoModel": "modeling_evil.Evil"})
    with pytest.raises(ModelUnavailable, match=r"delete auto_map from the config\.json of a copy"):
        resolve(folder)
    edit(folder / "config.json", auto_map={})
    assert np.array_equal(load(folder).read(TEXT, ["layers.1"])["layers.1"], expected)


def test_unknown_architecture_is_refused_without_a_question(folder: Path, traces: list[str]) -> None:
    edit(folder / "config.json", model_type="evil")
    with pytest.raises(ModelUnavailable, match=r"configuration of .* could not be loaded.*--activations"):
        load(folder)
    assert traces == []


def test_kernels_named_in_a_configuration_are_never_fetched(folder: Path) -> None:
    edit(folder / "config.json", attn_implementation="somebody/their-kernel")
    with pytest.raises(ModelUnavailable, match=r"compiled kernels from elsewhere \(attn_implementation"):
        load(folder)
    edit(folder / "config.json", attn_implementation="eager")
    load(folder)


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch $ELK_TRACE",)


def test_pickled_weights_are_never_opened(folder: Path, tmp_path: Path, traces: list[str]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ModelUnavailable, match=r"holds no model\.safetensors \(but pytorch_model\.bin\)"):
        load(folder)
    assert not ran(tmp_path)


def test_pickle_beside_safetensors_is_left_alone(folder: Path, tmp_path: Path, traces: list[str]) -> None:
    expected = load(folder).read(TEXT, ["layers.1"])["layers.1"]
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil()))
    assert np.array_equal(load(folder).read(TEXT, ["layers.1"])["layers.1"], expected)
    assert not ran(tmp_path)


def test_refusal_of_other_formats_says_how_to_convert_and_that_works(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(folder).read(TEXT, ["layers.1"])["layers.1"]
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable) as refusal:
        resolve(folder)
    (line,) = re.findall(r'python -c "(.*)"', str(refusal.value))
    assert "t.LlamaForCausalLM.from_pretrained" in line
    monkeypatch.chdir(tmp_path)
    exec(line, {})
    assert np.array_equal(load(tmp_path / "safe").read(TEXT, ["layers.1"])["layers.1"], expected)


def test_class_named_in_a_configuration_cannot_write_the_line_to_run(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    edit(folder / "config.json", architectures=["X; import os; os.remove('a')"])
    with pytest.raises(ModelUnavailable, match=r"t\.AutoModel\.from_pretrained") as refusal:
        resolve(folder)
    assert "os.remove" not in str(refusal.value)


def test_adapter_is_refused_before_it_names_another_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    with pytest.raises(ModelUnavailable, match=r"holds an adapter.*merge_and_unload"):
        resolve(folder)


def test_weights_that_are_missing_are_no_random_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"lacks 1 weights of LlamaForCausalLM \(model\.layers\.2\.mlp\.up_proj"):
        load(folder)


def test_encoder_saved_with_a_head_needs_no_pooler(tmp_path: Path) -> None:
    import transformers

    config = tiny.bert().config
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    tiny.tokenizer(encoder=True).save_pretrained(tmp_path)
    assert load(tmp_path).read(TEXT, ["layers.1"])["layers.1"].shape == (1, 24)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, r"config\.json .* is not JSON \(RecursionError\)"),
        (b'{"model_type": "\xff"}', r"is not JSON \(UnicodeDecodeError\)"),
        (b"{", r"is not JSON \(JSONDecodeError\)"),
        (b"[1]", "holds no JSON object but a list"),
    ],
)
def test_configuration_that_is_no_json_object_is_one_error(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelUnavailable, match=message):
        resolve(folder)


@pytest.mark.parametrize("shard", ["absent.safetensors", "../model.safetensors", 7, None])
def test_index_of_shards_names_files_of_the_folder(folder: Path, shard: Any) -> None:
    content = {"weight_map": {"w": shard}} if shard is not None else {}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ModelUnavailable, match=r"holds no (absent|\.\./model|readable model)\.safetensors"):
        resolve(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_damaged_file_is_one_clear_error(folder: Path, file: str) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:200])
    with pytest.raises(ModelUnavailable, match=r"could not be loaded.*save_pretrained"):
        load(folder)


def test_command_line_refuses_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from elk_stress.cli import main

    command = ["run", "--model", str(folder), "--out", str(tmp_path / "out"), "--no-progress"]
    assert main([*command, "--revision", "v1"]) == 2
    assert "a folder has no revisions" in capsys.readouterr().err
    edit(folder / "config.json", auto_map={"AutoModel": "modeling_evil.Evil"})
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "names code of its own" in line
    assert not (tmp_path / "out").exists()
    assert main(["run", "--activations", "a.npy", "--labels", "y.npy", "--revision", "v1"]) == 2
    assert "--revision does not apply" in capsys.readouterr().err
