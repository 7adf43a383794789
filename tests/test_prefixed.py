"""Items behind a prefix, against plain forward passes over the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models as tiny
import torch

from elk_stress.models.language_model import LanguageModel
from elk_stress.models.patched import CONTINUATION
from elk_stress.models.prefixed import PrefixedModel

HOST = "we and you and the red cat ."
TEXTS = [
    "the city of paris is in france .",
    "osaka is not in the country ?",
    "one two three lima",
    "the city of lima is not in the green country of japan .",
    "the city of paris",
]
ITEMS = np.arange(len(TEXTS))
CAUSAL = ["llama", "gpt2", "gemma2"]
SITES = {"embeddings": 0, "layers.0": 1, "layers.2": 3}


def beginning_tokenizer() -> object:
    """Puts a special token before every text, as many models' tokenizers do."""
    from tokenizers import processors

    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 2)])
    made.cls_token = "[CLS]"
    return made


def subject(kind: str = "llama", begins: bool = False) -> LanguageModel:
    tokenizer = beginning_tokenizer() if begins else tiny.tokenizer()
    return LanguageModel.from_modules(tiny.causal(kind), tokenizer, fingerprint=kind, causal=True)


def prefixed(kind: str = "llama", site: str = "layers.2", begins: bool = False) -> PrefixedModel:
    return PrefixedModel(subject(kind, begins), site, TEXTS, HOST)


def random_prefixes(model: PrefixedModel, m: int, length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    return rng.choice(model.vocabulary, (m, length))


def whole(model: PrefixedModel, prefix: np.ndarray, item: int) -> list[int]:
    """All tokens of one item behind a prefix."""
    text = model.subject.tokenizer(TEXTS[item])["input_ids"]
    begin = [2] if text[0] == 2 else []
    return [*begin, *prefix.tolist(), *text[len(begin) :]]


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("kind", CAUSAL)
def test_reads_what_a_plain_forward_pass_has(kind: str, begins: bool) -> None:
    for site, depth in SITES.items():
        model = prefixed(kind, site, begins)
        prefixes = random_prefixes(model, 3, 5)
        found = model.read_tokens(prefixes, ITEMS)
        assert found.shape == (3, len(TEXTS), 24)
        assert found.dtype == np.float32
        for j, prefix in enumerate(prefixes):
            for i in ITEMS.tolist():
                tokens = whole(model, prefix, i)
                assert tokens[0] == (2 if begins else prefix[0])
                with torch.no_grad():
                    states = model.subject.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
                np.testing.assert_allclose(found[j, i], states[depth][0, -1].numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("begins", [False, True])
def test_the_host_as_a_prefix_reads_what_the_testbed_reads(kind: str, begins: bool) -> None:
    model = prefixed(kind, begins=begins)
    expected = model.subject.read([f"{HOST} {text}" for text in TEXTS], ["layers.2"])["layers.2"]
    found = model.read_tokens(model.host_tokens[None], ITEMS)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(model.tokens(HOST), model.host_tokens)
    assert model.text(model.host_tokens) == HOST


def test_order_repetition_and_batching_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prefixed()
    prefixes = random_prefixes(model, 4, 6)
    found = model.read_tokens(prefixes, ITEMS)
    shuffled = np.array([3, 1, 1, 4])
    # rounding alone: products of other shapes sum in another order. A sum of up to 48 float32 terms is off by a few of
    # its units (1.2e-7), and 3 blocks carry that on: 1e-5 of the largest coordinate is some 80 units
    rounding = 1e-5 * float(np.abs(found).max())
    again = model.read_tokens(prefixes[::-1], shuffled)
    np.testing.assert_allclose(again, found[::-1][:, shuffled], rtol=0, atol=rounding)
    for module in ("language_model", "prefixed"):
        monkeypatch.setattr(f"elk_stress.models.{module}._BATCH_TOKENS", 13)
    np.testing.assert_allclose(model.read_tokens(prefixes, ITEMS), found, rtol=0, atol=rounding)
    shift = model.shift_tokens(prefixes[0], ITEMS)
    monkeypatch.setattr("elk_stress.models.prefixed._ROWS", 1)
    np.testing.assert_allclose(prefixed().shift_tokens(prefixes[0], shuffled), shift[shuffled], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", CAUSAL)
def test_what_comes_later_does_not_matter(kind: str) -> None:
    """The last item is how the first one begins: its activation is found inside the first one's pass."""
    model = prefixed(kind)
    prefix = random_prefixes(model, 1, 5)
    short = model.read_tokens(prefix, np.array([4]))[0, 0]
    with torch.no_grad():
        states = model.subject.model(torch.tensor([whole(model, prefix[0], 0)]), output_hidden_states=True)
    np.testing.assert_allclose(short, states.hidden_states[3][0, 5 + 4 - 1].numpy(), rtol=1e-4, atol=1e-5)
    # and what comes first does
    assert np.abs(short - model.read_tokens(prefix[:, ::-1], np.array([4]))[0, 0]).max() > 1e-3


def test_a_prefix_runs_once_and_nothing_runs_after_the_site() -> None:
    model = prefixed(site="layers.1")
    tokens: list[int] = []
    model.subject.blocks[1].register_forward_hook(lambda m, args, out: tokens.append(args[0].shape[:2].numel()))
    late: list[str] = []
    model.subject.blocks[2].register_forward_hook(lambda m, args, out: late.append("ran"))
    model.read_tokens(random_prefixes(model, 2, 6), np.array([0, 0, 0]))
    assert tokens == [2 * 6, 2 * 3 * 8]
    assert late == []


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("begins", [False, True])
def test_soft_prefix_at_tokens_reads_as_these_tokens(kind: str, begins: bool) -> None:
    model = prefixed(kind, begins=begins)
    prefix = random_prefixes(model, 1, 5)
    soft = model.read_soft(torch.as_tensor(model.embeddings(prefix[0])), ITEMS)
    np.testing.assert_allclose(soft.numpy(), model.read_tokens(prefix, ITEMS)[0], rtol=1e-4, atol=1e-5)
    assert np.array_equal(model.read_embeddings(model.embeddings(prefix), ITEMS), model.read_tokens(prefix, ITEMS))
    shift = model.shift_soft(model.embeddings(prefix[0]), ITEMS)
    np.testing.assert_allclose(shift, model.shift_tokens(prefix[0], ITEMS), rtol=1e-4, atol=1e-6)


def smooth(activations: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.1 * activations @ torch.linspace(-1, 1, 24).to(activations)).sum()


def double(kind: str) -> PrefixedModel:
    """In float64 where finite differences need it."""
    model = prefixed(kind)
    model.subject.model.double()
    for layer in model.subject.model.modules():
        vars(layer).pop("forward", None)
    return model


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("quantity", ["read_soft", "divergence"])
def test_gradient_is_that_of_finite_differences(kind: str, quantity: str) -> None:
    model = double(kind)
    rng = np.random.default_rng(3)
    tokens = random_prefixes(model, 1, 4)[0]
    prefix = torch.tensor(model.embeddings(tokens), dtype=torch.float64, requires_grad=True)

    def value(at: torch.Tensor) -> torch.Tensor:
        if quantity == "read_soft":
            return smooth(model.read_soft(at, ITEMS))
        return model.divergence(at, ITEMS).sum()

    (gradient,) = torch.autograd.grad(value(prefix), prefix)
    for _ in range(3):
        direction = torch.as_tensor(rng.standard_normal(prefix.shape))
        direction /= direction.norm()
        # activations leave in float32, so the step is large and the tolerance not small
        step = 1e-2
        with torch.no_grad():
            slope = (value(prefix + step * direction) - value(prefix - step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=2e-2, abs=2e-3)
    assert float(gradient.norm()) > 0.05, "large enough to tell right from wrong"


@pytest.mark.parametrize("kind", CAUSAL)
def test_token_gradient_is_the_slope_towards_each_token(kind: str) -> None:
    model = double(kind)
    prefix = random_prefixes(model, 1, 4)[0]
    value, gradient = model.token_gradient(prefix, ITEMS, smooth)
    assert gradient.shape == (4, len(model.vocabulary))
    assert gradient.dtype == np.float32
    at = torch.tensor(model.embeddings(prefix), dtype=torch.float64)
    with torch.no_grad():
        assert value == pytest.approx(float(smooth(model.read_soft(at, ITEMS))), rel=1e-5)
        for position, column in ((0, 3), (2, 16), (3, 5)):
            change = torch.zeros_like(at)
            assert model.vocabulary[column] != prefix[position]
            change[position] = torch.as_tensor(model.embeddings(model.vocabulary[column]) - at[position].numpy())
            step = 1e-2 / float(change.norm())
            slope = smooth(model.read_soft(at + step * change, ITEMS)) - smooth(
                model.read_soft(at - step * change, ITEMS)
            )
            here = int(np.flatnonzero(model.vocabulary == prefix[position])[0])
            expected = float(slope) / (2 * step)
            found = gradient[position, column] - gradient[position, here]
            assert found == pytest.approx(expected, rel=2e-2, abs=2e-3)


def test_reading_leaves_no_gradient_behind() -> None:
    model = prefixed()
    prefix = random_prefixes(model, 1, 4)[0]
    first = model.token_gradient(prefix, ITEMS, smooth)[1]
    assert np.array_equal(first, model.token_gradient(prefix, ITEMS, smooth)[1])
    assert all(p.grad is None and not p.requires_grad for p in model.subject.model.parameters())


# -- behaviour --------------------------------------------------------------------------------------------------------


def shift_by_hand(model: PrefixedModel, prefix: np.ndarray, item: int) -> float:
    """Whole sequences through the whole model, one at a time."""

    def log_p(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model.subject.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)

    host = list(model.subject.tokenizer(f"{HOST} {TEXTS[item]}")["input_ids"])
    behind = whole(model, prefix, item)
    at, there = len(host) - 1, len(behind) - 1
    for _ in range(CONTINUATION):
        host.append(int(log_p(host)[-1].argmax()))
    p, q = log_p(host)[at:], log_p(behind + host[at + 1 :])[there:]
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("kind", CAUSAL)
def test_shift_equals_whole_sequence_passes(kind: str, begins: bool) -> None:
    model = prefixed(kind, begins=begins)
    for prefix in (*random_prefixes(model, 2, 5), model.tokens("blue dog ?")):
        found = model.shift_tokens(prefix, ITEMS)
        expected = [shift_by_hand(model, prefix, i) for i in ITEMS.tolist()]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
        assert found.min() > 1e-3
    assert model.shift_tokens(model.host_tokens, ITEMS).max() < 1e-6


def test_shift_of_texts_is_that_of_their_tokens() -> None:
    model = prefixed()
    contexts = ["blue dog ?", HOST, "tea , rain , sun ."]
    found = model.shift_texts(contexts, ITEMS)
    assert found.shape == (3, len(TEXTS))
    for row, context in zip(found, contexts, strict=True):
        np.testing.assert_allclose(row, model.shift_tokens(model.tokens(context), ITEMS))
    assert found[1].max() < 1e-6 < found[[0, 2]].min()


def test_shift_after_the_site_and_reading_up_to_it_do_not_depend_on_each_other() -> None:
    """Behaviour does not depend on where activations are read."""
    prefix = random_prefixes(prefixed(), 1, 5)[0]
    first, last = (prefixed(site=site).shift_tokens(prefix, ITEMS) for site in ("layers.0", "layers.3"))
    np.testing.assert_allclose(first, last)


# -- tokens and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CAUSAL)
def test_vocabulary_holds_ordinary_printable_tokens_and_their_moments(kind: str) -> None:
    model = prefixed(kind, begins=True)
    words = model.subject.tokenizer.convert_ids_to_tokens(model.vocabulary.tolist())
    # [SEP] is an ordinary word here: this tokenizer declares the other three special, not this one
    assert set(tiny.WORDS) <= set(words)
    assert not {"[PAD]", "[UNK]", "[CLS]"} & set(words)
    with torch.no_grad():
        embedded = model.subject.model.get_input_embeddings()(torch.as_tensor(model.vocabulary)).numpy()
    np.testing.assert_allclose(model.embeddings(model.vocabulary), embedded)
    np.testing.assert_allclose(model.embedding_mean, embedded.mean(0), atol=1e-6)
    np.testing.assert_allclose(model.embedding_std, embedded.std(0), rtol=1e-5)
    assert model.embedding_std.dtype == np.float32


def test_words_that_are_not_printable_are_no_part_of_a_prefix() -> None:
    from elk_stress.models.prefixed import _printable

    assert [word for word in (" cat", "\n", "", "  ", "a\ufffd", "é", "\x00") if _printable(word)] == [" cat", "é"]


def test_encoders_are_refused() -> None:
    encoder = LanguageModel.from_modules(tiny.bert(), tiny.tokenizer(encoder=True), fingerprint="b", causal=False)
    with pytest.raises(TypeError, match="causal models only"):
        PrefixedModel(encoder, "layers.0", TEXTS, HOST)


def test_a_host_is_needed() -> None:
    with pytest.raises(ValueError, match="the host is empty"):
        PrefixedModel(subject(), "layers.0", TEXTS, " ")


def test_a_token_that_spans_context_and_item_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # without splitting into words first, a merge crosses the space
    vocabulary = {"[UNK]": 0, "a": 1, " ": 2, "b": 3, " b": 4, "a b": 5}
    merging = Tokenizer(models.BPE(vocabulary, [(" ", "b"), ("a", " b")], unk_token="[UNK]"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=merging, unk_token="[UNK]", pad_token="[UNK]")
    model = LanguageModel.from_modules(tiny.causal(), wrapped, fingerprint="bpe", causal=True)
    with pytest.raises(ValueError, match="do not split at the space"):
        PrefixedModel(model, "layers.0", ["b"], "a")
    # the same of a context that replaces a host without this trouble
    with pytest.raises(ValueError, match="do not split at the space"):
        PrefixedModel(model, "layers.0", ["b"], "b").shift_texts(["a"], np.array([0]))
