"""Reading and moving a language model, against plain forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch

from elk_stress.models.activation_cache import ActivationCache
from elk_stress.models.language_model import LanguageModel, Unreadable
from elk_stress.models.patched import CONTINUATION, MovedModel

TEXTS = [
    "we and you and the red cat . the city of paris is in france .",
    "we and you and the red cat . the city of osaka is in peru ?",
    "we and you and the red cat . osaka is not in the country .",
    "we and you and the red cat . one two three lima",
    "we and you and the red cat . the city of lima is not in the green country of japan .",
]
CAUSAL = ["llama", "gpt2", "gemma2"]


@pytest.fixture(params=CAUSAL)
def causal(request: pytest.FixtureRequest) -> LanguageModel:
    model = tiny.causal(request.param)
    return LanguageModel.from_modules(model, tiny.tokenizer(), fingerprint=request.param, causal=True)


@pytest.fixture
def llama() -> LanguageModel:
    return LanguageModel.from_modules(tiny.causal(), tiny.tokenizer(), fingerprint="llama", causal=True)


def plain(subject: LanguageModel, text: str, depth: int) -> np.ndarray:
    """The last token's state after ``depth`` blocks in an ordinary forward pass of one text."""
    ids = torch.tensor([subject.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        states = subject.model(ids, output_hidden_states=True).hidden_states
    return states[depth][0, -1].numpy()


def test_reads_what_a_plain_forward_pass_has(causal: LanguageModel) -> None:
    sites = ["embeddings", "layers.0", "layers.2"]
    found = causal.read(TEXTS, sites)
    for depth, site in zip((0, 1, 3), sites, strict=True):
        expected = np.stack([plain(causal, text, depth) for text in TEXTS])
        np.testing.assert_allclose(found[site], expected, rtol=1e-4, atol=1e-5)
    assert found["layers.0"].dtype == np.float32


@pytest.mark.parametrize("site", ["embeddings", "layers.2"])
def test_shared_prefix_changes_nothing(causal: LanguageModel, site: str) -> None:
    shared = causal.read(TEXTS, [site])[site]
    alone = causal.read(TEXTS, [site], share_prefix=False)[site]
    np.testing.assert_allclose(alone, shared, rtol=1e-4, atol=1e-5)


def test_nothing_runs_after_the_last_asked_for_site(llama: LanguageModel) -> None:
    runs: list[str] = []
    for name in ("layers.1", "layers.2", "norm"):
        module = llama.model.get_submodule(f"model.{name}")
        module.register_forward_hook(lambda m, a, out, name=name: runs.append(name))
    llama.model.lm_head.register_forward_hook(lambda m, a, out: runs.append("head"))
    llama.read(TEXTS, ["layers.1"])
    assert set(runs) == {"layers.1"}
    assert len(runs) == 2, "one pass for the common prefix and one for the rest"


def test_common_prefix_runs_once(llama: LanguageModel) -> None:
    tokens: list[int] = []
    llama.blocks[0].register_forward_pre_hook(lambda m, args: tokens.append(args[0].shape[0] * args[0].shape[1]))
    llama.read(TEXTS, ["layers.0"])
    together = sum(tokens)
    tokens.clear()
    llama.read(TEXTS, ["layers.0"], share_prefix=False)
    assert together < sum(tokens) - 3 * 8


def test_unknown_site_lists_the_known(llama: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"no site is called 'layers\.9'.*layers\.0 to layers\.3"):
        llama.read(TEXTS, ["layers.9"])


def test_text_without_tokens_is_refused(llama: LanguageModel) -> None:
    with pytest.raises(ValueError, match="has no tokens"):
        llama.read(["", "the cat"], ["layers.0"])


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        LanguageModel.from_modules(tiny.causal(), tiny.tokenizer(), fingerprint="x", causal=True, dtype="int8")


def test_bfloat16_reads_float32_arrays_near_the_exact_ones(llama: LanguageModel) -> None:
    rough = LanguageModel.from_modules(
        tiny.causal(), tiny.tokenizer(), fingerprint="b", causal=True, dtype="bfloat16"
    ).read(TEXTS, ["layers.1"])["layers.1"]
    exact = llama.read(TEXTS, ["layers.1"])["layers.1"]
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()


# -- the cache --------------------------------------------------------------------------------------------------------


def cached(folder: Path, fingerprint: str = "llama", **options: object) -> LanguageModel:
    cache = ActivationCache(folder, **options)  # type: ignore[arg-type]
    return LanguageModel.from_modules(
        tiny.causal(), tiny.tokenizer(), fingerprint=fingerprint, causal=True, cache=cache
    )


def forbid_running(subject: LanguageModel) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model ran although its activations were cached")

    subject.blocks[0].register_forward_pre_hook(refuse)


def test_second_reading_comes_from_disk_bit_for_bit(tmp_path: Path) -> None:
    first = cached(tmp_path).read(TEXTS, ["layers.1", "layers.2"])
    again = cached(tmp_path)
    forbid_running(again)
    second = again.read(TEXTS, ["layers.1", "layers.2"])
    for site, block in first.items():
        assert np.array_equal(block, second[site])


@pytest.mark.parametrize("change", ["texts", "fingerprint", "site"])
def test_anything_that_matters_changes_the_key(tmp_path: Path, change: str) -> None:
    cached(tmp_path).read(TEXTS, ["layers.1"])
    other = cached(tmp_path, fingerprint="other" if change == "fingerprint" else "llama")
    forbid_running(other)
    with pytest.raises(AssertionError, match="the model ran"):
        other.read(TEXTS[:-1] if change == "texts" else TEXTS, ["layers.2" if change == "site" else "layers.1"])


@pytest.mark.filterwarnings("ignore::elk_stress.models.activation_cache.DamagedCache")
def test_damaged_and_partial_files_count_as_absent(tmp_path: Path) -> None:
    expected = cached(tmp_path).read(TEXTS, ["layers.1"])["layers.1"]
    (file,) = tmp_path.glob("*.npy")
    file.write_bytes(file.read_bytes()[:100])
    found = cached(tmp_path).read(TEXTS, ["layers.1"])["layers.1"]
    assert np.array_equal(found, expected)
    assert not list(tmp_path.glob(".partial*"))


def test_cache_stays_below_its_bound_and_drops_the_oldest(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, max_bytes=3000)
    block = np.zeros((10, 24), dtype=np.float32)
    for i in range(5):
        cache.save(f"{i}", block)
        (tmp_path / f"{i}.npy").touch()
    assert sum(file.stat().st_size for file in tmp_path.glob("*.npy")) <= 3000
    assert cache.load("4") is not None
    assert cache.load("0") is None


def test_cache_that_cannot_be_written_costs_no_result(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert cached(blocked / "folder").read(TEXTS, ["layers.1"])["layers.1"].shape == (5, 24)


def test_interrupted_reading_keeps_what_was_finished(tmp_path: Path) -> None:
    subject = cached(tmp_path)
    subject.read(TEXTS[:3], ["layers.1"])

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        subject.read(TEXTS[2:], ["layers.1"], advance=interrupt)
    again = cached(tmp_path)
    forbid_running(again)
    again.read(TEXTS[:3], ["layers.1"])


# -- moves ------------------------------------------------------------------------------------------------------------


def brute_force(
    subject: LanguageModel, site: str, text: str, states: list[np.ndarray]
) -> tuple[list[int], list[np.ndarray]]:
    """Whole-sequence passes with the last state replaced: greedy continuation of the first, log-probabilities."""
    ids = list(subject.tokenizer(text)["input_ids"])
    at = len(ids) - 1
    depth = subject.depth(site)

    def log_probabilities(tokens: list[int], state: np.ndarray) -> torch.Tensor:
        def swap(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.clone()
            hidden[:, at] = torch.as_tensor(state)
            return hidden

        if depth < 0:
            handle = subject.blocks[0].register_forward_pre_hook(lambda m, args: (swap(args[0]), *args[1:]))
        else:
            handle = subject.blocks[depth].register_forward_hook(
                lambda m, a, out: (swap(out[0]), *out[1:]) if isinstance(out, tuple) else swap(out)
            )
        with torch.no_grad():
            logits = subject.model(torch.tensor([tokens])).logits[0, at:]
        handle.remove()
        return torch.log_softmax(logits.double(), dim=-1)

    for _ in range(CONTINUATION):
        ids.append(int(log_probabilities(ids, states[0])[-1].argmax()))
    return ids[at:], [log_probabilities(ids, state).numpy() for state in states]


@pytest.mark.parametrize("site", ["embeddings", "layers.0", "layers.2", "layers.3"])
def test_shift_equals_whole_sequence_passes(causal: LanguageModel, site: str) -> None:
    rng = np.random.default_rng(1)
    origins = causal.read(TEXTS, [site])[site] + 0.1 * rng.standard_normal((len(TEXTS), 24)).astype(np.float32)
    moved = MovedModel(causal, site, TEXTS, origins)
    items = np.array([3, 0, 4])
    moves = rng.standard_normal((3, 4, 24)).astype(np.float32)
    moves[:, 0] = 0
    found = moved.shift(items, moves)
    for row, item in enumerate(items):
        states = [origins[item], *(origins[item] + move for move in moves[row])]
        ids, (reference, *others) = brute_force(causal, site, TEXTS[item], states)
        assert moved._hosts[int(item)].ids.tolist() == ids
        expected = [float((np.exp(reference) * (reference - other)).sum(-1).mean()) for other in others]
        np.testing.assert_allclose(found[row], expected, rtol=1e-3, atol=1e-6)
    assert np.all(found[:, 0] < 1e-6)
    assert np.all(found[:, 1:] > 1e-3), "the moves are large enough to tell a right shift from none"


def test_moves_leave_the_model_as_it_was(causal: LanguageModel) -> None:
    before = causal.read(TEXTS, ["layers.3"], share_prefix=False)["layers.3"]
    moved = MovedModel(causal, "layers.1", TEXTS, causal.read(TEXTS, ["layers.1"])["layers.1"])
    moved.shift(np.array([0]), np.ones((1, 2, 24), dtype=np.float32))
    assert np.array_equal(causal.read(TEXTS, ["layers.3"], share_prefix=False)["layers.3"], before)


def test_fisher_predicts_small_shifts(causal: LanguageModel) -> None:
    origins = causal.read(TEXTS, ["layers.1"])["layers.1"]
    moved = MovedModel(causal, "layers.1", TEXTS, origins)
    items = np.array([1, 2])
    factor = moved.fisher(items, 1500, [np.random.SeedSequence(i) for i in range(2)])
    assert factor.shape == (2, 1500, 24)
    moves = 0.02 * np.random.default_rng(2).standard_normal((2, 6, 24)).astype(np.float32)
    quadratic = 0.5 * (np.einsum("prd,pnd->pnr", factor, moves) ** 2).sum(-1)
    # 1500 score vectors: relative standard error of a squared projection about sqrt(2/1500) = 3.7%, times 5
    np.testing.assert_allclose(quadratic, moved.shift(items, moves), rtol=0.18)
    again = moved.fisher(items, 1500, [np.random.SeedSequence(i) for i in range(2)])
    assert np.array_equal(factor, again)


def test_a_language_part_that_does_otherwise_alone_is_refused() -> None:
    model = tiny.causal()
    plain = model.forward

    def apart(ids: Any, **options: Any) -> Any:
        return plain(ids, position_ids=2 * torch.arange(ids.shape[1])[None], **options)

    model.forward = apart
    with pytest.raises(Unreadable, match="other states alone than in the whole model"):
        LanguageModel.from_modules(model, tiny.tokenizer(), fingerprint="x", causal=True)


def test_encoders_cannot_be_moved() -> None:
    subject = LanguageModel.from_modules(tiny.bert(), tiny.tokenizer(encoder=True), fingerprint="bert", causal=False)
    with pytest.raises(TypeError, match="causal models only"):
        MovedModel(subject, "layers.0", TEXTS, np.zeros((5, 24)))
