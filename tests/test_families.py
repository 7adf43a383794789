"""Every family of models against its own forward passes, and the table in docs/models.md against what is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
import transformers
from packaging.version import Version
from test_language_model import brute_force

from elk_stress import cli
from elk_stress.models.adapters import AdaptedModel
from elk_stress.models.language_model import LanguageModel, Unreadable, is_decoder
from elk_stress.models.patched import MovedModel, way_to_move
from elk_stress.models.prefixed import PrefixedModel, way_to_prefix
from elk_stress.testbeds.statements import Statements
from elk_stress.thoughts.engine import stress
from elk_stress.threats.threat import Threat
from elk_stress.training.language_model_trainee import LoraTrainee

TABLE = Path(__file__).parent.parent / "docs" / "models.md"
HOST = "we and you and the red cat ."
# of unlike lengths, all longer than the windows of four tokens
ITEMS = ["the city of paris is in france .", "one two three", "osaka is not in the green country of japan , lima ?"]
TEXTS = [f"{HOST} {item}" for item in ITEMS]
# families whose hidden states begin after the first block
AFTER = ("mamba", "mamba2", "falcon_mamba")
# families that older transformers cannot run themselves
FIXED_IN = {"recurrent_gemma (hybrid)": "5.18"}
WAYS = {"cached": "yes", "whole": "whole"}


def table() -> dict[str, dict[str, str]]:
    """The documented table: family -> column -> cell."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def subject_of(family: str, model: Any = None) -> LanguageModel:
    model = tiny.built(family) if model is None else model
    causal = is_decoder(model.config)
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    tokenizer = tiny.tokenizer(encoder=family in tiny.ENCODERS)
    return LanguageModel.from_modules(model, tokenizer, fingerprint=family, causal=causal)


def own_states(subject: LanguageModel, family: str, text: str) -> dict[str, np.ndarray]:
    """Site -> the last token's state that the model itself gives out for this text alone, nothing padded or shared."""
    ids = torch.tensor([subject.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        states = subject.model(ids, output_hidden_states=True).hidden_states
    sites = subject.sites[1:] if family in AFTER else subject.sites
    # the last one may be behind the final norm
    return {site: state[0, -1].numpy() for site, state in zip(sites[:-1], states, strict=False)}


def close(found: np.ndarray, expected: np.ndarray) -> None:
    # 1e-4 of the state's length, as reading guarantees
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def check_reading(subject: LanguageModel, family: str) -> None:
    expected = [own_states(subject, family, text) for text in TEXTS]
    for shared in (True, False):
        found = subject.read(TEXTS, list(expected[0]), share_prefix=shared)
        for i, states in enumerate(expected):
            for site, state in states.items():
                close(found[site][i], state)
    # texts that share nothing, one of them alone, and the last two tokens of each
    apart = subject.read(ITEMS[::-1], ["layers.1"])["layers.1"]
    for i, text in enumerate(ITEMS[::-1]):
        close(apart[i], own_states(subject, family, text)["layers.1"])
    close(subject.read(ITEMS[:1], ["layers.1"], tokens=2)["layers.1"][0, 1], apart[2])


def runs_the_prefix_once(subject: LanguageModel) -> bool:
    seen: list[int] = []
    handle = subject.blocks[0].register_forward_hook(lambda m, a, out: seen.append(1))
    subject.read([f"{HOST} one", f"{HOST} two"], ["layers.1"])
    handle.remove()
    return len(seen) == 2


def check_moves(subject: LanguageModel) -> None:
    rng = np.random.default_rng(1)
    for site in ("embeddings", "layers.1"):
        # the last two have one length, so they share a batch; the first has one by itself
        texts = [TEXTS[2], TEXTS[1], f"{HOST} two three cat"]
        origins = subject.read(texts, [site])[site]
        moved = MovedModel(subject, site, texts, origins)
        size = np.linalg.norm(origins, axis=1).mean() / 5
        moves = size * rng.standard_normal((3, 2, subject.dim)).astype(np.float32)
        moves[:, 0] = 0
        found = moved.shift(np.arange(3), moves)
        assert np.all(found[:, 0] < 1e-6)
        for item in (0, 2):
            ids, (p, q) = brute_force(subject, site, texts[item], [origins[item], origins[item] + moves[item, 1]])
            assert moved._hosts[item].ids.tolist() == ids
            expected = float((np.exp(p) * (p - q)).sum(-1).mean())
            assert expected > 1e-6, "large enough to tell a right shift from none"
            assert found[item, 1] == pytest.approx(expected, rel=1e-2, abs=1e-7)


def check_prefixes(subject: LanguageModel, family: str) -> None:
    model = PrefixedModel(subject, "layers.1", ITEMS, HOST)
    words = subject.tokenizer(" ".join(tiny.WORDS[:20]))["input_ids"]
    prefixes = np.random.default_rng(0).choice(words, (2, 6))
    found = model.read_tokens(prefixes, np.arange(3))
    for j, prefix in enumerate(prefixes):
        for i, item in enumerate(ITEMS):
            text = f"{model.text(prefix)} {item}"
            assert subject.tokenizer(text)["input_ids"][:6] == prefix.tolist()
            close(found[j, i], own_states(subject, family, text)["layers.1"])

    def log_p(text: str, continuation: list[int]) -> torch.Tensor:
        ids = torch.tensor([subject.tokenizer(text)["input_ids"] + continuation])
        with torch.no_grad():
            return subject.model(ids).logits[0, -len(continuation) - 1 :].double().log_softmax(-1)

    item, continued = 1, []
    for _ in range(8):
        continued.append(int(log_p(f"{HOST} {ITEMS[item]}", continued)[-1].argmax()))
    p, q = (log_p(f"{before} {ITEMS[item]}", continued) for before in (HOST, model.text(prefixes[0])))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    shifts = model.shift_tokens(prefixes[0], np.arange(3))
    assert shifts[item] == pytest.approx(expected, rel=1e-3, abs=1e-8)
    assert model.shift_tokens(model.host_tokens, np.arange(3)).max() < 1e-6


def linear_names(subject: LanguageModel) -> list[str]:
    """Names of the blocks' linear layers that can be adapted, the usual ones first."""
    layers = [(n.rsplit(".", 1)[-1], m) for block in subject.blocks[:3] for n, m in block.named_modules()]
    names = list(dict.fromkeys(name for name, module in layers if isinstance(module, torch.nn.Linear)))
    return ["q_proj", "v_proj"] if {"q_proj", "v_proj"} <= set(names) else sorted(names, key=lambda n: "q" not in n)


def check_adapters(subject: LanguageModel, family: str, names: list[str]) -> None:
    """With B at random, the adapted model reads what a model with W + B A in place of W gives out itself."""
    adapted = AdaptedModel(subject, "layers.2", names, 2)
    adaptable = {id(module) for block in adapted.reader.blocks[:3] for module in block.modules()}
    assert {id(matrix.layer) for matrix in adapted.matrices} <= adaptable, "nothing behind the site, nor in a tower"
    flat = 0.1 * np.random.default_rng(0).standard_normal(adapted.n_parameters).astype(np.float32)
    before = adapted.read(TEXTS)
    adapted.load(flat)
    found = adapted.read(TEXTS)
    other = subject_of(family)
    with torch.no_grad():
        for matrix in adapted.matrices:
            a = torch.from_numpy(flat[matrix.a]).reshape(2, -1)
            b = torch.from_numpy(flat[matrix.b]).reshape(-1, 2)
            other.model.get_submodule(matrix.name).weight += b @ a
    for i, text in enumerate(TEXTS):
        close(before[i], own_states(subject, family, text)["layers.2"])
        close(found[i], own_states(other, family, text)["layers.2"])
    assert np.abs(found - before).max() > 1e-4


def lora_cell(subject: LanguageModel, family: str) -> str:
    """``yes`` with the default matrices, else the name of one that has to be given, or ``no``."""
    names = linear_names(subject)
    for chosen in [names] if names == ["q_proj", "v_proj"] else [[name] for name in names]:
        try:
            check_adapters(subject, family, chosen)
        except TypeError:
            return "no"
        return "yes" if names == ["q_proj", "v_proj"] else f"`{chosen[0]}`"
    return "no"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_family_does_what_the_table_says(family: str) -> None:
    model = tiny.built(family)
    documented = table()[family]
    broken = family in FIXED_IN and Version(transformers.__version__) < Version(FIXED_IN[family])
    if documented["read"] == "no" or broken:
        assert broken or documented == dict.fromkeys(documented, "no")
        with pytest.raises(Unreadable, match=r"cannot be read right: .*--activations"):
            subject_of(family, model)
        return
    subject = subject_of(family, model)
    check_reading(subject, family)
    found = {"read": "yes", "shared prefix": "no", "move": "no", "prefix attack": "no", "LoRA": "no"}
    if subject.shared:
        assert runs_the_prefix_once(subject)
        found["shared prefix"] = "yes"
    if subject.silent:
        for refused in (way_to_move, way_to_prefix):
            with pytest.raises(TypeError, match="causal models only"):
                refused(subject)
    else:
        found["move"] = WAYS[way_to_move(subject)]
        check_moves(subject)
        found["prefix attack"] = WAYS[way_to_prefix(subject)]
        check_prefixes(subject, family)
    found["LoRA"] = lora_cell(subject, family)
    assert found == documented


def test_the_table_lists_every_family() -> None:
    assert list(table()) == list(tiny.FAMILIES)


# -- from a folder, as `elk-stress run --model FOLDER` has it ---------------------------------------------------------


def saved(model: Any, folder: Path, encoder: bool = False) -> Path:
    model.save_pretrained(folder)
    tiny.tokenizer(encoder=encoder).save_pretrained(folder)
    return folder


def with_head(family: str, factory: str) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, factory).from_config(tiny.config(family)).eval()


FOLDERS = {
    # family and factory of what is saved -> the class that reads it, and whether it is causal
    ("gemma3 (with vision)", ""): ("Gemma3ForConditionalGeneration", True),
    ("llava", ""): ("LlavaForConditionalGeneration", True),
    ("gemma3 (text), window 4", ""): ("Gemma3ForCausalLM", True),
    ("bert as decoder", ""): ("BertLMHeadModel", True),
    ("llama", "AutoModel"): ("LlamaModel", True),
    ("t5 encoder", "AutoModelForSeq2SeqLM"): ("T5Stack", False),
    ("bart encoder", "AutoModelForSeq2SeqLM"): ("BartEncoder", False),
    ("bert", "AutoModelForMaskedLM"): ("BertModel", False),
    ("roberta", "AutoModelForMaskedLM"): ("RobertaModel", False),
}


@pytest.mark.parametrize(("family", "factory"), FOLDERS)
def test_a_checkpoint_is_what_its_text_configuration_says(family: str, factory: str, tmp_path: Path) -> None:
    model = with_head(family, factory) if factory else tiny.built(family)
    name, causal = FOLDERS[family, factory]
    subject = LanguageModel(saved(model, tmp_path, family in tiny.ENCODERS), cache=None)
    assert (subject.name, subject.causal) == (name, causal)
    assert bool(subject.silent) is (not causal or factory == "AutoModel")
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    ids = torch.tensor([subject.tokenize(ITEMS[:1])[0]])
    with torch.no_grad():
        own = encoder(ids, output_hidden_states=True).hidden_states[2][0, -1].numpy()
    close(subject.read(ITEMS[:1], ["layers.1"])["layers.1"][0], own)


def test_what_cannot_be_read_is_refused_on_the_command_line_before_reading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tiny.built("albert"), tmp_path / "model", encoder=True)
    code = cli.main(["run", "--model", str(folder), "--probes", "mass_mean", "--out", str(tmp_path / "out")])
    told = " ".join(capsys.readouterr().err.split())
    assert code == cli.USAGE
    assert "AlbertModel cannot be read right" in told
    assert "--activations" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(("family", "silent"), [("bert", True), ("t5 encoder", True), ("mamba", False), ("opt", False)])
def test_statements_end_to_end(family: str, silent: bool) -> None:
    """Free threats are measured on every model; kept ones where it says something, else they do not apply."""
    testbed = Statements(subject=subject_of(family), n_items=80, n_contexts=6, site="layers.1")
    threats = (Threat(), Threat(kept=True))
    result = stress(testbed, "mass_mean", threats=threats, attacks=("token_prefix",), n_particles=100, controls=False)
    assert Threat().name in result.threats
    kept = Threat(kept=True).name
    if silent:
        assert "encoder: it predicts no next token" in result.skipped[kept]
        assert testbed.shift_cost == "none"
        assert str(testbed.describe()["behaviour"]).startswith("none: ")
    else:
        assert kept in result.threats
        assert testbed.shift_cost == "model"


def test_trained_adapters_need_what_a_model_says_next() -> None:
    testbed = Statements(subject=subject_of("bert"), n_items=40, n_contexts=6, site="layers.1")
    with pytest.raises(TypeError, match="BertModel is an encoder"):
        LoraTrainee.of(testbed)


def test_the_longest_text_that_fits_is_read_and_a_longer_one_refused() -> None:
    """RoBERTa's first position is the one after the padding index: 130 rows hold 128 tokens."""
    model = tiny.built("roberta", max_position_embeddings=130)
    subject = subject_of("roberta", model)
    # two special tokens around the words
    longest = " ".join(["the"] * 126)
    found = subject.read([longest], ["layers.1"])["layers.1"][0]
    close(found, own_states(subject, "roberta", longest)["layers.1"])
    with pytest.raises(ValueError, match="129 tokens but the model takes 128"):
        subject.read([f"{longest} the"], ["layers.1"])


def test_what_is_slower_is_said() -> None:
    assert "cannot be shared" in subject_of("mamba").facts["reading"]
    assert "one length" in subject_of("fnet").facts["padding"]
    assert not {"reading", "padding", "behaviour"} & set(subject_of("llama").facts)
