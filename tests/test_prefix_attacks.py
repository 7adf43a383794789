"""Soft prompts and token prefixes on a tiny language model: learned on training items, judged on others."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
from scipy.stats import wilcoxon

from elk_stress.attacks.soft_prompt import SoftPrompt
from elk_stress.attacks.token_prefix import TokenPrefix
from elk_stress.models.language_model import LanguageModel
from elk_stress.models.prefixed import PrefixedModel
from elk_stress.testbeds.linear import Linear
from elk_stress.testbeds.protocol import SplitName
from elk_stress.testbeds.statements import Statements
from elk_stress.thoughts.attacks.model_access import ModelAccess
from elk_stress.thoughts.attacks.prefixes import evasion_loss, natural_epsilon, prefix_edit, sentences
from elk_stress.thoughts.attacks.protocol import Access, Attack, Oracle, Proposal
from elk_stress.thoughts.attacks.runner import run_attack
from elk_stress.thoughts.attacks.target import AttackTarget, attack_target
from elk_stress.thoughts.baseline import baseline_of
from elk_stress.thoughts.prepared import Prepared, fit_probe, prepare
from elk_stress.threats.threat import Threat

TOKENS = TokenPrefix(length=5, steps=6, candidates=12, sentences=6, top=8)
SOFT = SoftPrompt(length=4, steps=40, rate=0.1, sentences=6)
ATTACKS: dict[str, Attack] = {
    "soft": SOFT,
    "gradient": TOKENS,
    "substitute": replace(TOKENS, search="substitute"),
    "independent": replace(TOKENS, search="independent"),
}


def write_items(path: Path) -> Path:
    """Statements in the tiny model's words; positive are those that ask."""
    nouns, colours, countries = ("cat", "dog", "tea", "rain", "sun", "city"), ("red", "blue", "green"), range(6)
    names = ("france", "japan", "peru", "paris", "osaka", "lima")
    lines = []
    for noun, colour, country in itertools.product(nouns, colours, countries):
        for label in (0, 1):
            text = f"the {colour} {noun} of {names[country]} {'?' if label else '.'}"
            lines.append(json.dumps({"text": text, "label": label, "group": f"{noun} {colour} {country}"}))
    path.write_text("\n".join(lines))
    return path


@cache
def prepared() -> Prepared:
    import tempfile

    subject = LanguageModel.from_modules(tiny.causal(), tiny.tokenizer(), fingerprint="tiny", causal=True)
    with tempfile.TemporaryDirectory() as folder:
        data = write_items(Path(folder) / "items.jsonl")
        testbed = Statements(data=data, site="layers.2", n_contexts=48, subject=subject)
    return replace(prepare(testbed), replicates=100)


@cache
def target(kept: bool = False) -> AttackTarget:
    probe = fit_probe(prepared(), "logistic")
    threat = Threat(kept=kept)
    return attack_target(prepared(), baseline_of(prepared(), probe, threat, 0.05), prepared().epsilon if kept else None)


def mind_for(access: Access, kept: bool = False) -> ModelAccess:
    return target(kept).model_access(access, 2000)


def propose(attack: Attack, kept: bool = False, seed: int = 0) -> tuple[Proposal, ModelAccess, Oracle]:
    model_access = mind_for(attack.access, kept)
    oracle = Oracle(target(kept).searched, attack.access, 100, None, model_access)
    return attack.propose(oracle, seed=seed), model_access, oracle


def held_out(proposal: Proposal) -> np.ndarray:
    """Scores of the attacked test items after the edit."""
    assert proposal.edit is not None
    activations = proposal.edit.moved("test")[target().items]
    return np.asarray(target().baseline.probe.score(activations), dtype=float)


def test_the_stage_is_set() -> None:
    """A probe worth attacking: it catches at least 30 held-out items, whose entities it never saw."""
    detection = target().baseline.detection
    assert detection.auroc > 0.95
    assert len(target().items) >= 30


# -- strength ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["soft", "gradient", "substitute"])
def test_learned_prefix_lowers_held_out_scores_more_than_random_ones(name: str) -> None:
    attack = ATTACKS[name]
    learned = held_out(propose(attack)[0])
    # one-sided, paired over items: false alarm at most 0.1%
    before = np.asarray(target().baseline.probe.score(prepared().test_origins[target().items]), dtype=float)
    assert wilcoxon(learned, before, alternative="less").pvalue < 1e-3
    assert (learned < target().baseline.detection.threshold).mean() > 0.5
    same_count = held_out(propose(ATTACKS["independent"])[0])
    assert wilcoxon(learned, same_count, alternative="less").pvalue < 1e-3
    proposal, _, oracle = propose(attack)
    control = attack.control(oracle, proposal, seed=1)  # type: ignore[attr-defined]
    assert wilcoxon(learned, held_out(control), alternative="less").pvalue < 1e-3


@pytest.mark.parametrize("search", ["gradient", "substitute", "independent"])
def test_more_steps_never_do_worse_on_what_is_learned_on(search: str) -> None:
    values = []
    for steps in range(8):
        recipe = replace(TOKENS, search=search, steps=steps, candidates=3)  # type: ignore[arg-type]
        proposal, model_access, _ = propose(recipe)
        items = sentences(model_access, recipe.sentences, np.random.default_rng(np.random.SeedSequence(0)))
        assert proposal.edit is not None
        values.append(
            float(evasion_loss(model_access.score(proposal.edit.moved("train")[items]), model_access.threshold))
        )
    # one seed: the longer search goes the shorter one's way, and then on
    assert np.all(np.diff(values) <= 1e-6)
    assert values[-1] < values[0]


def test_gradient_ranks_what_helps_above_what_does_not() -> None:
    """Substitutions that the gradient ranks first lower the loss more than those that it ranks last."""
    from elk_stress.attacks.token_prefix import _Hunt

    model_access = mind_for("gradient")
    rng = np.random.default_rng(np.random.SeedSequence(5))
    hunt = _Hunt(TOKENS, model_access, model_access.model("train"), sentences(model_access, 6, rng), None, rng)
    gaps = []
    for _ in range(8):
        prefix = rng.choice(hunt.model.vocabulary, 5)
        ranked = replace(TOKENS, top=len(hunt.model.vocabulary))
        order = _Hunt(ranked, model_access, hunt.model, hunt.items, None, rng)._ranked(prefix)
        losses = []
        for chosen in (order[:, :3], order[:, -3:]):
            tried = np.repeat(prefix[None], 15, axis=0)
            tried[np.arange(15), np.repeat(np.arange(5), 3)] = chosen.ravel()
            scores = model_access.score(hunt.model.read_tokens(tried, hunt.items).reshape(90, -1)).reshape(15, 6)
            losses.append(float(evasion_loss(scores, model_access.threshold).mean()))
        gaps.append(losses[1] - losses[0])
    assert np.mean(np.array(gaps) > 0) >= 0.75
    assert np.mean(gaps) > 0


def test_penalty_buys_fewer_bits_and_the_bits_are_those_of_the_shift() -> None:
    free, cheap = (propose(replace(SOFT, penalty=penalty))[0] for penalty in (0.0, 0.1))
    assert free.spent is not None
    assert cheap.spent is not None
    assert 0 < cheap.spent[0] < free.spent[0]
    # every coordinate moves by at most the rate in a step of Adam (and a little more in its first ones)
    reach = SOFT.steps * SOFT.rate * 1.5 * math.sqrt(SOFT.length * 24)
    assert free.spent[0] < reach**2 / (2 * math.log(2))


def test_without_noise_it_writes_one_prompt_and_knows_no_bits() -> None:
    exact = replace(SOFT, noise=False)
    proposal, _, oracle = propose(exact)
    assert proposal.spent is None
    before = np.asarray(target().baseline.probe.score(prepared().test_origins[target().items]), dtype=float)
    assert wilcoxon(held_out(proposal), before, alternative="less").pvalue < 1e-3
    assert not np.array_equal(proposal.moves, propose(SOFT)[0].moves)
    with pytest.raises(ValueError, match="use noise=True"):
        exact.control(oracle, proposal, seed=0)


def test_noise_is_the_prior_itself() -> None:
    """Without steps the prompt is a draw of the prior: the embedding table's moments, and no bits spent."""
    written: list[np.ndarray] = []
    recipe = replace(SOFT, steps=0, length=200)
    model_access = mind_for("gradient")
    u = recipe._normal(model_access, 7, 0)
    assert abs(u.mean()) < 5 / math.sqrt(u.size)
    assert abs(u.std() - 1) < 5 / math.sqrt(2 * u.size)
    short = replace(SOFT, steps=0)
    model = model_access.model("test")
    original = model.read_embeddings
    model.read_embeddings = lambda prefixes, items: (written.append(np.asarray(prefixes)), original(prefixes, items))[1]
    try:
        proposal = propose(short, seed=7)[0]
    finally:
        del model.read_embeddings
    assert proposal.spent is not None
    assert proposal.spent[0] == 0
    expected = model.embedding_mean + model.embedding_std * short._normal(model_access, 7, 0)
    np.testing.assert_allclose(written[0][0], expected, rtol=1e-5, atol=1e-6)


# -- what it is allowed and what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ATTACKS))
def test_questions_are_counted(name: str) -> None:
    attack = ATTACKS[name]
    _, model_access, oracle = propose(attack)
    assert int(oracle.queries.max()) == int(oracle.gradients.max()) == 0, "it learns on training items alone"
    if name == "soft":
        assert model_access.queries == model_access.gradients == SOFT.steps * SOFT.sentences
        return
    tried = (1 + TOKENS.steps * TOKENS.candidates) * TOKENS.sentences
    assert model_access.queries == tried + model_access.gradients
    assert (model_access.gradients > 0) == (name == "gradient")
    assert model_access.gradients <= TOKENS.steps * TOKENS.sentences


def test_declared_access_is_what_is_asked() -> None:
    assert [ATTACKS[name].access for name in ATTACKS] == ["gradient", "gradient", "score", "score"]
    for attack, less in ((SOFT, "score"), (TOKENS, "score"), (ATTACKS["substitute"], "label")):
        model_access = mind_for(less)  # type: ignore[arg-type]
        oracle = Oracle(target().searched, less, 100, None, model_access)  # type: ignore[arg-type]
        with pytest.raises(PermissionError, match=f"declares '{less}' access"):
            attack.propose(oracle, seed=0)


def test_control_asks_nothing() -> None:
    for attack in (SOFT, TOKENS):
        proposal, model_access, oracle = propose(attack)
        asked = model_access.queries
        control = attack.control(oracle, proposal, seed=0)
        assert model_access.queries == asked
        assert control.spent is not None
        assert proposal.spent is not None
        expected = proposal.spent[0] if attack is SOFT else 0.0
        assert control.spent[0] == pytest.approx(expected)


def test_spent_bits_by_the_prefix_prior() -> None:
    words = 32
    assert TOKENS.spent(words) == 5 * 5
    assert replace(TOKENS, search="substitute", length=50).spent(words) == pytest.approx(6 * math.log2(13))
    assert replace(TOKENS, search="independent").spent(words) == pytest.approx(math.log2(1 + 6 * 12))
    # no search among T tokens spends more than naming them
    assert replace(TOKENS, search="substitute", length=1).spent(words) == 5
    model = prepared().testbed.prefixed("train")  # type: ignore[attr-defined]
    spent = propose(TOKENS)[0].spent
    assert spent is not None
    assert spent[0] == pytest.approx(5 * math.log2(len(model.vocabulary)))


@pytest.mark.parametrize("name", list(ATTACKS))
def test_same_seed_same_prefix_other_seed_another(name: str) -> None:
    attack = ATTACKS[name]
    first, again, other = (propose(attack, seed=seed)[0].moves for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_sentences_are_training_positives_and_never_negated_halves() -> None:
    model_access = mind_for("score")
    chosen = sentences(model_access, 6, np.random.default_rng(np.random.SeedSequence(0)))
    assert len(set(chosen.tolist())) == 6
    assert (model_access.truth("train")[chosen] == 1).all()
    assert set(chosen.tolist()) <= set(model_access.training.tolist())
    every = sentences(model_access, 10_000, np.random.default_rng(np.random.SeedSequence(0)))
    assert len(every) == int(model_access.truth("train")[model_access.training].sum())
    with pytest.raises(ValueError, match="learned on training positives"):
        sentences(model_access, 0, np.random.default_rng(np.random.SeedSequence(0)))


def test_an_unknown_search_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'gradient', 'substitute' or 'independent'"):
        TokenPrefix(search="best")  # type: ignore[arg-type]


# -- the engine judges ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["soft", "gradient"])
def test_engine_finds_what_the_attack_says(name: str) -> None:
    attack = ATTACKS[name]
    row = run_attack(attack, target(), budget=100, seed=0)
    assert row.status == "ok"
    learned = held_out(propose(attack)[0])
    # the engine applies the move that the edit is: exact where the prior spans all directions
    assert row.success == pytest.approx((learned <= target().baseline.detection.threshold).mean(), abs=0.05)
    assert row.success > 0.5
    assert row.auroc is not None
    assert row.audit is not None
    assert row.shift is not None
    assert row.shift > 0


@pytest.mark.parametrize("name", ["soft", "gradient"])
def test_kept_behaviour_is_judged_by_whole_passes(name: str) -> None:
    attack = ATTACKS[name]
    proposal, model_access, _ = propose(attack, kept=True)
    assert proposal.edit is not None
    assert proposal.edit.shift is not None
    assert proposal.edit.epsilon == pytest.approx(natural_epsilon(model_access))
    shift = proposal.edit.shift(model_access.items[:4])
    assert shift.shape == (4,)
    assert (shift > 0).all()
    row = run_attack(attack, target(True), budget=100, seed=0)
    free = run_attack(attack, target(), budget=100, seed=0)
    assert row.status == "ok"
    assert row.success <= free.success + 1e-9


@pytest.mark.parametrize("name", ["soft", "gradient"])
def test_behaviour_weighs_in_where_it_is_constrained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("soft_prompt", "token_prefix"):
        # nothing counts as kept, so that the least shift is always worth something
        monkeypatch.setattr(f"elk_stress.attacks.{module}.natural_epsilon", lambda model_access: 0.0)
    base = ATTACKS[name]
    shifts = []
    for weight in (0.0, 100.0):
        proposal, model_access, _ = propose(replace(base, behaviour=weight), kept=True)  # type: ignore[type-var]
        assert proposal.edit is not None
        assert proposal.edit.shift is not None
        shifts.append(float(proposal.edit.shift(model_access.items).mean()))
    assert shifts[1] < shifts[0]


def test_natural_epsilon_is_three_times_an_ordinary_change_of_context() -> None:
    from elk_stress.models.contexts import contexts

    model_access = mind_for("none", kept=True)
    model = model_access.model("test")
    others = [context for context in contexts("prior", 9) if context != model.host][:8]
    expected = 3 * np.median([model.shift_tokens(model.tokens(c), model_access.items[:12]) for c in others])
    assert natural_epsilon(model_access) == pytest.approx(float(expected))
    assert natural_epsilon(mind_for("none")) is None


def test_edit_reads_every_split_once_and_is_the_prefix_itself() -> None:
    model_access = mind_for("score")
    asked: list[SplitName] = []
    prefix = model_access.model("train").vocabulary[:4]

    def read(model: PrefixedModel, items: np.ndarray) -> np.ndarray:
        asked.append("test")
        return model.read_tokens(prefix[None], items)[0]

    edit = prefix_edit(model_access, read, lambda model, items: model.shift_tokens(prefix, items), None)
    first, second = edit.moved("test"), edit.moved("test")
    assert len(asked) == 1
    assert np.array_equal(first, second)
    model = model_access.model("test")
    np.testing.assert_allclose(first[:2], model.read_tokens(prefix[None], np.arange(2))[0], atol=1e-5)
    assert edit.shift is not None
    np.testing.assert_allclose(edit.shift(np.arange(2)), model.shift_tokens(prefix, np.arange(2)), rtol=1e-5)


def test_loss_is_the_softplus_of_the_margin() -> None:
    scores = np.array([[3.0, -2.0], [800.0, 1.0]])
    expected = [np.mean(np.log1p(np.exp([2.0, -3.0]))), (799 + math.log(2)) / 2]
    np.testing.assert_allclose(evasion_loss(scores, 1.0), expected)


@pytest.mark.parametrize("name", ["soft_prompt", "token_prefix"])
def test_neither_applies_without_a_language_model(name: str) -> None:
    made = prepare(Linear(dim=8, n_items=160, n_contexts=8))
    baseline = baseline_of(made, made.testbed.known_probes()["paper"], Threat(), 0.05)
    attack = SoftPrompt() if name == "soft_prompt" else TokenPrefix()
    row = run_attack(attack, attack_target(made, baseline, None), budget=10, seed=0)
    assert row.status.startswith("does not apply: ")
    assert "language model" in row.status
