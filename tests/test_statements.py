"""Facts, contexts, users' files and the statements testbed; the real model in tests marked ``model``."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny

from elk_stress.core import registry
from elk_stress.models import contexts
from elk_stress.models.language_model import LanguageModel
from elk_stress.testbeds import facts
from elk_stress.testbeds import protocol as contract
from elk_stress.testbeds.protocol import check_splits
from elk_stress.testbeds.statements import Statements
from elk_stress.testbeds.user_data import load_jsonl

ALL = list(facts.RELATIONS)
BIG_ENOUGH_FOR_DEMO = [name for name in ALL if name != "element_group"]


# -- facts ------------------------------------------------------------------------------------------------------------


def test_at_least_4000_statements_all_different() -> None:
    made = [statement for name in ALL for statement in facts.statements(facts.relation(name))]
    assert len(made) >= 4000
    assert len({statement.text for statement in made}) == len(made)
    assert sum(facts.available().values()) == len(made)


@pytest.mark.parametrize("name", ALL)
def test_every_entity_comes_in_four_balanced_forms(name: str) -> None:
    relation = facts.relation(name)
    made = facts.statements(relation)
    forms = Counter((statement.true, statement.negated) for statement in made)
    assert set(forms.values()) == {len(relation.facts)}
    # every value is said equally often truly and falsely
    for negated in (False, True):
        said = [Counter(s.value for s in made if s.true is true and s.negated is negated) for true in (True, False)]
        assert said[0] == said[1]
    for statement in made:
        is_so = relation.facts[statement.entity] == statement.value
        assert statement.true == (is_so != statement.negated)
        assert (" not " in statement.text) == statement.negated
        assert statement.entity.lower() in statement.text.lower()
        assert statement.value in statement.text


def test_known_facts() -> None:
    assert facts.relation("city_country").facts["Paris"] == "France"
    assert facts.relation("country_capital").facts["Japan"] == "Tokyo"
    assert facts.relation("country_continent").facts["Kenya"] == "Africa"
    assert facts.relation("country_currency").facts["India"] == "the rupee"
    assert facts.relation("element_symbol").facts["iron"] == "Fe"
    assert facts.relation("element_number").facts["carbon"] == "6"
    assert facts.relation("element_group").facts["neon"] == "group 18"
    assert facts.relation("city_country").say("Paris", "Japan").text == "The city of Paris is in Japan."


def test_the_facts_name_their_sources_and_licences() -> None:
    file = json.loads(Path(facts.__file__).with_name("facts.json").read_text("utf-8"))
    assert list(file["relations"]) == ALL
    assert {source["name"] for source in file["sources"]} == set(facts.sources())
    assert all(source["version"] and "licence" in source and source["url"] for source in file["sources"])


def test_the_facts_are_what_the_sources_say() -> None:
    """Against the packages themselves, where the extra ``facts`` is installed at the versions of the file."""
    for name, version in facts.sources().items():
        if pytest.importorskip(name, reason="needs the extra facts").__version__ != version:
            pytest.skip(f"the file was made of {name} {version}")
    from elk_stress.testbeds.collect_facts import collect

    assert collect() == json.loads(Path(facts.__file__).with_name("facts.json").read_text("utf-8"))


def test_ambiguous_and_telling_cities_are_left_out() -> None:
    relation = facts.relation("city_country")
    for name in (
        "Hyderabad",
        "Valencia",
        "Mexico City",
        "Kuwait City",
        "Singapore",
        "Hong Kong",
        "Sevastopol",
        "Brooklyn",
    ):
        assert name not in relation.facts
    assert relation.forbidden["London"] == {"Canada"}
    assert not relation.may_say("London", "Canada")
    assert relation.may_say("London", "France")


@pytest.mark.parametrize("name", ALL)
def test_quads_are_balanced_and_disjoint(name: str) -> None:
    relation = facts.relation(name)
    quads = facts.draw(relation, 12, seed=3)
    entities = [statement.entity for quad in quads for statement in quad]
    assert len(set(entities)) == len(entities) == 48
    for quad in quads:
        assert [statement.true for statement in quad] == [True, True, False, False]
        assert not any(statement.negated for statement in quad)
        if not relation.unique:
            true, false = (sorted(s.value for s in quad if s.true is truth) for truth in (True, False))
            assert true == false
    assert [[s.text for s in quad] for quad in quads] == [[s.text for s in q] for q in facts.draw(relation, 12, seed=3)]
    assert quads != facts.draw(relation, 12, seed=4)


def test_too_many_items_and_unknown_relation_are_refused() -> None:
    with pytest.raises(ValueError, match="ask for fewer items"):
        facts.draw(facts.relation("element_group"), 100, seed=0)
    with pytest.raises(ValueError, match="known: city_country"):
        facts.relation("city_county")


def held_out_surface_auroc(texts: list[str], labels: np.ndarray, groups: np.ndarray) -> float:
    """AUROC across held-out groups of a classifier that sees words and word pairs only, averaged over folds."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold

    words = CountVectorizer(ngram_range=(1, 2)).fit_transform(texts)
    values = []
    for fit, held in GroupKFold(5).split(words, labels, groups):
        scores = LogisticRegression(max_iter=1000).fit(words[fit], labels[fit]).decision_function(words[held])
        values.append(roc_auc_score(labels[held], scores))
    return float(np.mean(values))


@pytest.mark.parametrize("name", ["city_country", "country_capital", "country_continent", "element_symbol"])
def test_no_surface_cue(name: str) -> None:
    quads = facts.draw(facts.relation(name), 10_000, seed=1, at_least=20)
    made = [statement for quad in quads for statement in quad]
    labels = np.array([int(statement.true) for statement in made])
    auroc = held_out_surface_auroc([s.text for s in made], labels, np.repeat(np.arange(len(quads)), 4))
    # a quad holds each word equally often with both labels: words carry nothing by construction. Standard error of an
    # AUROC of n items at chance: sqrt((n+1)/(3 n^2)) * ... about 1/sqrt(3n) ; five of them
    assert abs(auroc - 0.5) < 5 / np.sqrt(3 * len(made))


def test_surface_classifier_would_notice_a_cue() -> None:
    """The control: false values drawn from other countries than the true ones are found out at once."""
    quads = facts.draw(facts.relation("city_country"), 80, seed=1)
    made = [statement for quad in quads for statement in quad]
    labels = np.array([int(statement.true) for statement in made])
    texts = [s.text if s.true else re.sub(r"in [^.]*\.", "in Atlantis.", s.text) for s in made]
    assert held_out_surface_auroc(texts, labels, np.repeat(np.arange(80), 4)) > 0.95


# -- contexts ---------------------------------------------------------------------------------------------------------


def test_contexts_are_many_different_and_split() -> None:
    a, b = contexts.contexts("prior"), contexts.contexts("observed")
    assert len(a) + len(b) == len(set(a) | set(b)) >= 128
    assert min(len(a), len(b)) >= 64
    assert contexts.contexts("prior", 8) == a[:8]
    lengths = [len(context.split()) for context in a + b]
    assert min(lengths) >= 4
    assert max(lengths) <= 30
    with pytest.raises(ValueError, match=f"between 1 and {len(a)}"):
        contexts.contexts("prior", 1000)


def test_contexts_say_nothing_of_truth_places_or_chemistry() -> None:
    told = {"true", "false", "right", "wrong", "country", "city", "capital", "currency", "element", "chemical", "fact"}
    places = {v.lower().removeprefix("the ") for v in facts.relation("city_country").facts.values()}
    elements = set(facts.relation("element_symbol").facts)
    for context in contexts.every_context():
        words = set(re.findall(r"[a-z]+", context.lower()))
        assert not words & (told | places | elements), context


# -- the testbed's splits (no model) ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BIG_ENOUGH_FOR_DEMO)
@pytest.mark.parametrize("positive", ["false", "true"])
def test_splits_of_the_demo(name: str, positive: str) -> None:
    splits = Statements(relation=name, positive=positive).splits  # type: ignore[arg-type]
    assert check_splits(splits) == []
    train, calibration, test = (splits[split] for split in ("train", "calibration", "test"))
    assert (len(train), len(calibration), len(test)) == (48, 32, 24)
    assert int((calibration.labels == 0).sum()) == 24
    assert int(test.labels.sum()) == 12
    assert train.pairs is not None
    assert train.texts is not None
    for affirmed, negated in train.pairs:
        assert train.groups[affirmed] == train.groups[negated]
        assert train.labels[affirmed] + train.labels[negated] == 1
        assert train.texts[negated].replace(" not ", " ") == train.texts[affirmed]
    plain = np.setdiff1d(np.arange(48), train.pairs[:, 1])
    assert len(plain) == len(set(train.groups[plain])) == 24
    assert not any(" not " in text for items in (calibration, test) for text in items.texts or ())


def test_positive_says_which_truth_must_be_caught() -> None:
    false, true = (Statements(positive=p).splits["test"] for p in ("false", "true"))  # type: ignore[arg-type]
    relation = facts.relation("city_country")
    for items, truth in ((false, False), (true, True)):
        for name, label in zip(items.ids, items.labels, strict=True):
            entity, value = name.split(" | ")
            assert (relation.facts[entity] == value) == (bool(label) == truth)


def test_full_has_120_calibration_negatives() -> None:
    splits = Statements(size="full").splits
    assert check_splits(splits) == []
    affirmed = len(splits["train"]) // 2
    assert affirmed + len(splits["calibration"]) + len(splits["test"]) == 400
    assert int((splits["calibration"].labels == 0).sum()) >= 120


def test_seed_decides() -> None:
    first, again, other = (Statements(seed=seed).splits["test"].texts for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "demo, full"),
        ({"positive": "maybe"}, "'false' or 'true'"),
        ({"n_items": 8}, "at least 40"),
        ({"n_contexts": 5}, "at least 6"),
        ({"relation": "element_symbol", "size": "full"}, "ask for fewer items"),
        ({"relation": "nothing"}, "known: city_country"),
    ],
)
def test_bad_options_are_refused_before_the_long_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.load("testbeds", "statements", **options)


# -- a user's file ----------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def rows(n: int = 60) -> list[object]:
    words = ["cat", "dog", "tea", "rain", "sun"]
    return [{"text": f"the {words[i % 5]} {i} is {'red' if i % 2 else 'blue'} .", "label": i % 2} for i in range(n)]


def load(path: Path) -> dict[str, object]:
    return dict(load_jsonl(path, np.random.SeedSequence(0)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": 1', r"line 3: not JSON"),
        ("[1, 2]", r"line 3: expected an object"),
        ('{"label": 1}', r"line 3: the field text"),
        ('{"text": "  ", "label": 1}', r"line 3: the field text"),
        ('{"text": "a"}', r"line 3: the field label must be 0 or 1"),
        ('{"text": "a", "label": 2}', r"line 3: the field label must be 0 or 1.*got 2"),
        ('{"text": "a", "label": "yes"}', r"line 3: the field label"),
    ],
)
def test_malformed_line_is_an_error_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "data.jsonl", [*rows(2), line, *rows(40)]))


def test_useless_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data file"):
        load(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="no items"):
        load(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(ValueError, match="only items with label 0"):
        load(write(tmp_path / "one.jsonl", [{"text": "a", "label": 0}] * 50))
    with pytest.raises(ValueError, match="at least 10 of"):
        load(write(tmp_path / "few.jsonl", rows(12)))
    with pytest.raises(ValueError, match=r"one class only|uneven"):
        load(write(tmp_path / "two.jsonl", [{**row, "group": row["label"]} for row in rows()]))  # type: ignore[dict-item, index]


def test_groups_and_pairs_stay_together(tmp_path: Path) -> None:
    paired = [{**row, "pair": i // 2} for i, row in enumerate(rows(80))]  # type: ignore[dict-item]
    splits = load_jsonl(write(tmp_path / "pairs.jsonl", list(paired)), np.random.SeedSequence(1))
    assert check_splits(splits) == []
    assert sum(map(len, splits.values())) == 80
    for items in splits.values():
        assert items.pairs is not None
        assert len(items.pairs) == len(items) // 2
        assert np.all(items.labels[items.pairs].sum(axis=1) == 1)
    assert [len(splits[split]) for split in ("train", "calibration", "test")] == [24, 32, 24]
    bad = [*paired, {"text": "a third", "label": 1, "pair": 0}]
    with pytest.raises(ValueError, match="pair '0' must be two lines"):
        load(write(tmp_path / "bad.jsonl", list(bad)))
    crossing = [*rows(40), {"text": "a", "label": 0, "pair": 1, "group": "x"}, {"text": "b", "label": 1, "pair": 1}]
    with pytest.raises(ValueError, match="spans two groups"):
        load(write(tmp_path / "crossing.jsonl", list(crossing)))


# -- the whole testbed on a tiny model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Statements:
    path = write(tmp_path_factory.mktemp("data") / "data.jsonl", rows())
    subject = LanguageModel.from_modules(tiny.causal(), tiny.tokenizer(), fingerprint="tiny", causal=True)
    made = Statements(data=path, n_contexts=6, subject=subject)
    made.prepare()
    return made


def test_is_a_testbed(testbed: Statements) -> None:
    assert isinstance(testbed, contract.Testbed)
    assert testbed.site in testbed._loaded().sites
    assert testbed.dim == 24
    assert json.loads(json.dumps(testbed.describe()))["site"] == testbed.site


def test_activations_are_those_of_context_and_item(testbed: Statements) -> None:
    subject = testbed._loaded()
    for which, n in (("prior", 3), ("observed", 2), ("bare", 1)):
        assert testbed.activations("test", which).shape == (len(testbed.splits["test"]), n, 24)  # type: ignore[arg-type]
    text = (testbed.splits["test"].texts or ())[4]
    assert testbed.activations("train", "fit").shape == (len(testbed.splits["train"]), 1, 24)
    with pytest.raises(LookupError, match="only training items"):
        testbed.activations("test", "fit")
    context = contexts.contexts("observed", 2)[1]
    alone = subject.read([f"{context} {text}"], [testbed.site])[testbed.site][0]
    np.testing.assert_allclose(testbed.activations("test", "observed")[4, 1], alone, rtol=1e-4, atol=1e-5)
    bare = subject.read([text], [testbed.site])[testbed.site][0]
    np.testing.assert_allclose(testbed.activations("test", "bare")[4, 0], bare, rtol=1e-4, atol=1e-5)


def test_shift_is_zero_at_the_origin_and_its_factor_predicts_small_ones(testbed: Statements) -> None:
    items = np.array([2, 0])
    rng = np.random.default_rng(0)
    assert testbed.shift_cost == "model"
    assert np.all(testbed.shift("test", items, np.zeros((2, 1, 24))) < 1e-9)
    small = 0.02 * rng.standard_normal((2, 200, 24))
    factor = testbed.shift_factor("test", items)
    assert factor.shape == (2, 32, 24)
    predicted = 0.5 * (np.einsum("prd,pnd->pnr", factor, small) ** 2).sum(-1)
    # over many directions the ratio of means tends to that of traces: relative error about sqrt(2/32) / sqrt(rank)
    ratio = predicted.mean(axis=1) / testbed.shift("test", items, small).mean(axis=1)
    np.testing.assert_allclose(ratio, 1, atol=0.6)
    assert np.array_equal(testbed.shift_factor("test", items[::-1].copy()), factor[::-1])


def test_origin_is_the_mean_over_the_prior_after_the_medoid_context(testbed: Statements) -> None:
    means = testbed.activations("train", "prior").mean(axis=0)
    nearest = int(np.linalg.norm(means - means.mean(axis=0), axis=1).argmin())
    assert testbed.host_context == contexts.contexts("prior", 4)[1 + nearest]
    moved = testbed._moved_model("test")
    np.testing.assert_array_equal(moved._origins, testbed.activations("test", "prior").mean(axis=1))
    texts = [f"{testbed.host_context} {text}" for text in testbed.splits["test"].texts or ()]
    assert moved._rows == testbed._loaded().tokenize(texts)


def test_site_is_chosen_without_calibration_or_test(tmp_path: Path) -> None:
    read: list[str] = []
    subject = LanguageModel.from_modules(tiny.causal(), tiny.tokenizer(), fingerprint="tiny", causal=True)
    made = Statements(size="full", data=write(tmp_path / "data.jsonl", rows()), n_contexts=6, subject=subject)
    plain = subject.read

    def spy(texts: list[str], sites: list[str], **options: object) -> dict[str, np.ndarray]:
        read.extend(texts if len(sites) > 1 else [])
        return plain(texts, sites, **options)  # type: ignore[arg-type]

    subject.read = spy  # type: ignore[method-assign, assignment]
    made._choose_site(subject, None)
    assert sorted(read) == sorted(made.splits["train"].texts or ())


def test_site_selection_pool_is_disjoint_from_calibration_and_test() -> None:
    made = Statements()
    assert made._site_items is not None
    used = {str(group) for split in ("calibration", "test") for group in made.splits[split].groups}  # type: ignore[index]
    assert len(made._site_items) == 160
    assert not used & set(made._site_items.groups.tolist())


def test_unknown_site_is_refused_before_reading(tmp_path: Path) -> None:
    subject = LanguageModel.from_modules(tiny.causal(), tiny.tokenizer(), fingerprint="tiny", causal=True)
    with pytest.raises(ValueError, match="no site is called"):
        Statements(site="layers.77", subject=subject).prepare()


def test_progress_counts_to_its_total(tmp_path: Path) -> None:
    from rich.console import Console
    from rich.progress import Progress

    subject = LanguageModel.from_modules(tiny.causal(), tiny.tokenizer(), fingerprint="tiny", causal=True)
    with Progress(console=Console(quiet=True)) as progress:
        Statements(data=write(tmp_path / "d.jsonl", rows()), n_contexts=6, subject=subject).prepare(progress)
    assert len(progress.tasks) == 3
    assert all(task.finished for task in progress.tasks)


# -- the real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    return LanguageModel()


@pytest.mark.model
def test_the_truth_is_there(smollm2: LanguageModel) -> None:
    """Site chosen on a validation half of the entities, judged on the other half."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    quads = facts.draw(facts.relation("city_country"), 100, seed=5)
    made = [statement for quad in quads for statement in quad]
    labels = np.array([int(not statement.true) for statement in made])
    sites = [f"layers.{i}" for i in (6, 12, 15, 18, 21)]
    found = smollm2.read([statement.text for statement in made], sites)
    fit, validation, test = np.split(np.arange(400), [200, 280])

    def auroc(site: str, rows: np.ndarray) -> float:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        probe.fit(found[site][fit], labels[fit])
        return float(roc_auc_score(labels[rows], probe.decision_function(found[site][rows])))

    chosen = max(sites, key=lambda site: auroc(site, validation))
    assert auroc(chosen, test) >= 0.90
    assert auroc("layers.6", test) < auroc(chosen, test), "the words alone do not tell"


@pytest.mark.model
def test_real_model_is_read_and_moved_as_plain_passes_say(smollm2: LanguageModel) -> None:
    import torch

    context = contexts.contexts("prior")[0]
    texts = [f"{context} The city of {city} is in {where}." for city, where in (("Paris", "France"), ("Osaka", "Peru"))]
    site = "layers.15"
    found = LanguageModel.read(smollm2, texts, [site])[site]
    ids = torch.tensor([smollm2.tokenizer(texts[1])["input_ids"]])
    with torch.no_grad():
        expected = smollm2.model(ids, output_hidden_states=True).hidden_states[16][0, -1].numpy()
    np.testing.assert_allclose(found[1], expected, atol=1e-4 * np.abs(expected).max())

    from elk_stress.models.patched import MovedModel

    moved = MovedModel(smollm2, site, texts, found)
    rng = np.random.default_rng(0)
    moves = (0.1 * found.std() * rng.standard_normal((2, 3, smollm2.dim))).astype(np.float32)
    shifts = moved.shift(np.array([0, 1]), moves)
    factor = moved.fisher(np.array([0, 1]), 32, [np.random.SeedSequence(i) for i in range(2)])
    quadratic = 0.5 * (np.einsum("prd,pnd->pnr", factor, moves) ** 2).sum(-1)
    np.testing.assert_allclose(quadratic.mean(axis=1) / shifts.mean(axis=1), 1, atol=0.4)

    whole = torch.cat([ids, moved._hosts[1].ids[None, 1:]], dim=1)
    last = ids.shape[1] - 1

    def log_probabilities(state: np.ndarray) -> torch.Tensor:
        def swap(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, last] = torch.as_tensor(state)
            return output

        handle = smollm2.blocks[15].register_forward_hook(swap)
        with torch.no_grad():
            logits = smollm2.model(whole).logits[0, last:]
        handle.remove()
        return torch.log_softmax(logits.double(), dim=-1)

    reference, other = log_probabilities(found[1]), log_probabilities(found[1] + moves[1, 0])
    expected_shift = float((reference.exp() * (reference - other)).sum(-1).mean())
    np.testing.assert_allclose(shifts[1, 0], expected_shift, rtol=1e-3)
