"""Special tokens once and where they belong, against the tokenizer's own chat template and the model's own pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch

from elk_stress.models import contexts
from elk_stress.models.language_model import LanguageModel
from elk_stress.models.special_tokens import surrounding, templates_in
from elk_stress.testbeds.statements import Statements

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(before: str = "[CLS]", after: str = "") -> Any:
    """Bytes as tokens, so that every newline counts; puts ``before`` and ``after`` around a text; knows turns."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|im_start|>", "<|im_end|>", "<think>", "  "]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*names, *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:6]])
    made.add_tokens([AddedToken(name, special=False, normalized=False) for name in names[6:]])
    used = [(name, names.index(name)) for name in (before, after) if name]
    if used:
        form = " ".join(part for part in (before, "$A", after) if part)
        made.post_processor = processors.TemplateProcessing(form, special_tokens=used)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="[CLS]", unk_token="[UNK]", mask_token="[MASK]", pad_token="[UNK]"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def llama(tokenizer: Any) -> LanguageModel:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    return LanguageModel.from_modules(model, tokenizer, fingerprint="chat", causal=True)


def test_rendered_chat_is_read_as_the_tokenizer_itself_reads_it() -> None:
    tokenizer = chat_tokenizer()
    subject = llama(tokenizer)
    messages = [{"role": "user", "content": "Is it so?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert text.endswith("assistant\n")
    assert tokenizer(text)["input_ids"][:2] == [1, 1], "the tokenizer adds a second one"
    assert subject.tokenize([text]) == [ids]
    with torch.no_grad():
        states = subject.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    found = subject.read([text, "a longer ordinary text beside it " * 4], ["layers.0"])["layers.0"][0]
    np.testing.assert_allclose(found, states[1][0, -1].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [("[CLS]", ""), ("", "[SEP]"), ("[CLS]", "[SEP]"), ("", "")])
def test_what_surrounds_a_text_is_found_and_put_there_once(before: str, after: str) -> None:
    tokenizer = chat_tokenizer(before, after)
    subject = llama(tokenizer)
    plain, both = subject.tokenize(["a b", f"{before}a b{after}"])
    assert plain == both == tokenizer("a b")["input_ids"]
    # what a text itself says twice it says twice
    twice = f"{before}{before}a b{after}{after}"
    assert subject.tokenize([twice])[0] == tokenizer(twice, add_special_tokens=False)["input_ids"]
    told = subject.facts.get("special_tokens", "")
    assert all(name in told for name in (before, after))
    assert ("not twice" in told) == bool(before or after)


def test_unknown_first_word_is_not_taken_for_a_beginning() -> None:
    tokenizer = tiny.tokenizer(encoder=True)
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing("[UNK] $A", special_tokens=[("[UNK]", 1)])
    around = surrounding(tokenizer)
    assert around.before == (1,)
    assert around.once([1, 1, 9], "zebra cat") == [1, 1, 9]
    assert around.once([1, 1, 9], "[UNK] cat") == [1, 9]


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("<|im_start|>system\nyou are<|im_end|>", "<|im_start|>"),
        ("no turn at first<|im_end|>", "<|im_end|>"),
        ("[CLS]a sentence", "[CLS]"),
        ("<think>hm", "<think>"),
        # no token of this tokenizer
        ("<|user|>\nhello", "<|user|>"),
        ("[INST] hello [/INST]", "[INST]"),
        ("<start_of_turn>user", "<start_of_turn>"),
        ("hello <\uff5cUser\uff5c>", "<\uff5cUser\uff5c>"),
    ],
)
def test_template_that_a_text_brings_is_found(text: str, marker: str) -> None:
    assert templates_in(chat_tokenizer(), [text]) == [marker]


@pytest.mark.parametrize(
    "text",
    [
        "The city of Lyon.",
        "no thought <think> at the start",
        "two  spaces",
        "the [MASK] of it",
        "a < b | c > d",
        "x[0] and [1]",
        "\n tail \n",
        "é\u2028",
    ],
)
def test_ordinary_text_brings_no_template(text: str) -> None:
    assert templates_in(chat_tokenizer(), [text]) == [None]


def test_words_that_a_tokenizer_does_not_know_are_no_template() -> None:
    assert templates_in(tiny.tokenizer(encoder=True), ["zebras are unknown"]) == [None]


# -- what cannot be tokenized ------------------------------------------------------------------------------------------


def test_tokenizing_says_what_it_cannot_take() -> None:
    subject = llama(chat_tokenizer())
    assert subject.tokenize([]) == []
    with pytest.raises(TypeError, match="expected texts as str, got bytes"):
        subject.tokenize([b"the cat"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"half a surrogate pair at character 2"):
        subject.tokenize(["ok", "a \ud800"])
    with pytest.raises(ValueError, match=r"begins with 'xxx.*has 257 tokens but the model takes 256"):
        subject.tokenize(["short", "x" * 256])
    assert len(subject.tokenize(["x" * 255])[0]) == 256


def test_positions_after_a_padding_index_leave_fewer_tokens() -> None:
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=len(tiny.WORDS) + 4,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=20,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.RobertaModel(config).eval()
    subject = LanguageModel.from_modules(model, tiny.tokenizer(), fingerprint="roberta", causal=False)
    most = " ".join(["cat"] * 18)
    ids = torch.tensor([subject.tokenizer(most)["input_ids"]])
    model(ids)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.cat([ids, ids[:, :1]], dim=1))
    assert len(subject.tokenize([most])[0]) == 18
    with pytest.raises(ValueError, match="19 tokens but the model takes 18"):
        subject.tokenize([most + " cat"])


# -- a user's texts under contexts ------------------------------------------------------------------------------------


def data(folder: Path, form: str) -> Path:
    path = folder / "data.jsonl"
    rows = [{"text": form.format(f"{i} is {'odd' if i % 2 else 'even'}"), "label": i % 2} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["<|im_start|>system\n{}<|im_end|>\n", "[CLS]{}", "{} [INST]"])
def test_no_context_is_put_before_a_template_that_a_text_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    subject = llama(chat_tokenizer())
    monkeypatch.setattr(subject, "read", lambda *_, **__: pytest.fail("something was read"))
    path = data(tmp_path, form)
    message = rf"{path}, line 1 and 59 more: the text brings a template of its own.*give the statements without it"
    with pytest.raises(ValueError, match=message):
        Statements(data=path, n_contexts=6, subject=subject).prepare()


def test_first_line_with_a_template_is_named(tmp_path: Path) -> None:
    path = data(tmp_path, "{}")
    lines = path.read_text().splitlines()
    lines[36] = json.dumps({"text": "37 is odd<|im_end|>", "label": 1})
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"line 37: the text brings a template of its own \('<\|im_end\|>'\)"):
        Statements(data=path, n_contexts=6, subject=llama(chat_tokenizer())).prepare()


def test_template_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from elk_stress.cli import main
    from elk_stress.models import language_model

    folder = tmp_path / "model"
    llama(chat_tokenizer()).model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(language_model, "load_model", lambda *_: pytest.fail("the model was loaded"))
    path = data(tmp_path, "<|im_start|>user\n{}")
    command = ["run", "--model", str(folder), "--data", str(path), "--out", str(tmp_path / "out"), "--no-progress"]
    capsys.readouterr()
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "line 1 and 59 more: the text brings a template" in line


@pytest.mark.parametrize("form", ["{}\n", "\n{}", " {}.", "{}\u2028 \n\n", "{}"])
def test_bytes_of_an_item_stay_as_they_are_after_a_context(tmp_path: Path, form: str) -> None:
    tokenizer = chat_tokenizer()
    subject = llama(tokenizer)
    made = Statements(data=data(tmp_path, form), n_contexts=6, site="layers.0", subject=subject)
    text, context = (made.splits["test"].texts or ())[3], contexts.contexts("observed", 2)[1]
    joined = contexts.after(context, text)
    assert joined == context + ("" if form[0].isspace() else " ") + text
    for which, whole in {"observed": joined, "bare": text}.items():
        ids = torch.tensor([tokenizer(whole)["input_ids"]])
        assert bytes(tokenizer.decode(ids[0, 1:].tolist()), "utf-8") == whole.encode()
        with torch.no_grad():
            expected = subject.model(ids, output_hidden_states=True).hidden_states[1][0, -1].numpy()
        found = made.activations("test", which)[3, -1]  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_context_goes_before_a_text_and_never_into_it() -> None:
    assert contexts.after("So.", "it is") == "So. it is"
    assert contexts.after("So.", "\nit is ") == "So.\nit is "
    assert contexts.after("", " it") == " it"


def test_text_too_long_after_the_longest_context_is_refused_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = llama(chat_tokenizer())
    chosen = [*contexts.contexts("prior", 4), *contexts.contexts("observed", 2)]
    room = 256 - 1 - max(len(context.encode()) for context in chosen) - 1
    path = data(tmp_path, "{}")
    lines = path.read_text().splitlines()

    def made(n: int) -> Statements:
        lines[0] = json.dumps({"text": "x" * n, "label": 0})
        path.write_text("\n".join(lines))
        return Statements(data=path, n_contexts=6, site="layers.0", subject=subject)

    made(room).prepare()
    monkeypatch.setattr(subject, "read", lambda *_, **__: pytest.fail("something was read"))
    with pytest.raises(ValueError, match="has 257 tokens but the model takes 256"):
        made(room + 1).prepare()
