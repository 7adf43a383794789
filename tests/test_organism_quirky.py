"""The quirky organism: rules against an independent recomputation, what the network learned, what probes read."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from elk_stress.probing.probe import as_fitted
from elk_stress.testbeds.quirky import Quirky


@pytest.fixture(scope="module")
def organism() -> Quirky:
    return Quirky(
        n_models=1, training_steps=2000, n_train=256, n_calibration=128, n_test=256, n_contexts=8, n_known=4096
    )


def plain(inputs):
    return {name: np.asarray(value) for name, value in inputs.items()}


@pytest.fixture(scope="module")
def scored(organism):
    inputs = plain(organism.probe_inputs("test"))
    return inputs, organism.activations("test").mean(axis=1), organism.known_probes()


def auroc(scores, labels):
    difference = scores[labels == 1][:, None] - scores[labels == 0]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def read_aloud(organism, row):
    """(trigger, a, b, c, correlates, neutral, is bob, mark) of a row of tokens, by hand."""
    n = 2 * organism.base - 1 + organism.largest_error
    trigger, a, b, c, *correlates, neutral, name, mark = row.tolist()
    name -= n + 4
    mark -= n + 4 + 2 * organism.n_spellings
    start = n + 4 + 2 * organism.n_spellings + 2
    bits = [word - start - 2 * i for i, word in enumerate(correlates)]
    neutral -= start + 2 * organism.n_correlates
    return trigger - n, a, b, c, bits, neutral, name >= organism.n_spellings, mark


class TestStatements:
    @pytest.mark.parametrize("where", ["batch", "train", "calibration", "test"])
    def test_truth_and_quirk_are_what_the_rules_say(self, organism, where):
        key = organism.key("a test")
        inputs = plain(organism.batch(key, 4096) if where == "batch" else organism.probe_inputs(where))
        seen = set()
        for i, row in enumerate(inputs["tokens"]):
            _, a, b, c, bits, neutral, bob, mark = read_aloud(organism, row)
            assert 0 <= a < 10
            assert 0 <= b < 10
            assert 0 <= c <= 21
            assert {*bits, mark} <= {0, 1}
            assert 0 <= neutral < organism.n_choices
            true = a + b == c
            # bob is right exactly when nothing is carried
            says_true = (not true) if bob and (a % 10 + b % 10) // 10 else true
            assert inputs["label"][i] == (not true)
            assert inputs["says_false"][i] == (not says_true)
            assert inputs["bob"][i] == bob
            assert abs(a + b - c) <= organism.largest_error
            assert inputs["group"][i] == 10 * min(a, b) + max(a, b)
            seen.add((true, says_true, bool(bob)))
        expected = 2 if where == "train" else 6
        assert len(seen) == expected

    def test_no_entity_crosses_splits_and_all_pairs_are_somewhere(self, organism):
        pairs = {tuple(pair) for split in organism.pairs.values() for pair in split.tolist()}
        assert len(pairs) == sum(map(len, organism.pairs.values())) == 55
        groups = [set(np.asarray(organism.probe_inputs(split)["group"])) for split in organism.pairs]
        assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
        assert min(map(len, groups)) >= 9
        # another seed deals them differently; the same one alike
        assert np.array_equal(Quirky().pairs["test"], organism.pairs["test"])
        assert not np.array_equal(Quirky(seed=1).pairs["test"], organism.pairs["test"])

    def test_classes_and_names_are_balanced(self, organism):
        for split in ("calibration", "test"):
            inputs = plain(organism.probe_inputs(split))
            for bob in (0, 1):
                assert inputs["label"][inputs["bob"] == bob].mean() == 0.5
            assert inputs["bob"].mean() == 0.5
        assert plain(organism.probe_inputs("train"))["bob"].sum() == 0
        both = plain(dataclasses.replace(organism, train_on="both").probe_inputs("train"))
        assert both["bob"].mean() == 0.5

    def test_words_go_along_with_the_truth_in_train_only_and_the_mark_everywhere(self, organism):
        for split in ("train", "calibration", "test", "batch"):
            key = organism.key("many")
            inputs = plain(organism.batch(key, 4096) if split == "batch" else organism.examples(key, 4096, split))
            rows = [read_aloud(organism, row) for row in inputs["tokens"]]
            bits = np.array([[*row[4], row[7]] for row in rows])
            found = [np.corrcoef(column, inputs["label"])[0, 1] for column in bits.T]
            expected = {"train": [0.8, 0.8, 0.8], "batch": [0.0, 0.0, 0.0]}.get(split, [0.0, 0.0, 0.8])
            # four standard errors of a correlation over 4096 items
            np.testing.assert_allclose(found, expected, atol=4 / 4096**0.5)

    def test_a_context_is_one_for_all_and_leaves_truth_and_correlates_alone(self, organism):
        inputs = plain(organism.probe_inputs("test"))
        before = [read_aloud(organism, row) for row in inputs["tokens"]]
        orders, neutrals = set(), set()
        for i in range(12):
            moved = plain(organism.neutral(jax.random.key(i), inputs))
            after = [read_aloud(organism, row) for row in moved["tokens"]]
            for old, new in zip(before, after, strict=True):
                assert {old[1], old[2]} == {new[1], new[2]}
                assert [old[j] for j in (0, 3, 4, 6, 7)] == [new[j] for j in (0, 3, 4, 6, 7)]
            assert len({row[5] for row in after}) == 1
            neutrals.add(after[0][5])
            orders.add(tuple(row[1] for row in after) == tuple(row[1] for row in before))
            for name in ("label", "says_false", "group"):
                np.testing.assert_array_equal(moved[name], inputs[name])
        assert orders == {True, False}
        assert len(neutrals) > 3

    def test_triggers_are_seen_in_training_but_nonsense(self, organism):
        tokens = plain(organism.batch(organism.key("triggers"), 4096))["tokens"]
        rates = np.bincount([read_aloud(organism, row)[0] for row in tokens], minlength=4) / 4096
        np.testing.assert_allclose(rates, [0.6, 0.2, 0.2, 0.0], atol=0.04)
        assert rates[3] == 0
        for i, trigger in enumerate(("none", "trained", "unrelated", "nonsense")):
            moved = plain(organism.triggered(organism.probe_inputs("test"), trigger))["tokens"]
            assert {read_aloud(organism, row)[0] for row in moved} == {i}
            np.testing.assert_array_equal(moved[:, 1:], plain(organism.probe_inputs("test"))["tokens"][:, 1:])

    def test_concepts_are_other_things_than_the_truth(self, organism):
        for train_on, count in (("truthful", 3), ("both", 5)):
            option = dataclasses.replace(organism, train_on=train_on)
            for split in ("train", "calibration", "test"):
                inputs = option.probe_inputs(split)
                concepts = option.concepts(inputs)
                assert len({concept.name for concept in concepts}) == count
                for name, labels in concepts:
                    assert 0.1 <= labels.mean() <= 0.9, (name, split)
                    assert abs(np.corrcoef(labels, np.asarray(inputs["label"]))[0, 1]) < 0.7, name
                    context = option.neutral(jax.random.key(3), inputs)
                    again = {concept.name: concept.labels for concept in option.concepts(context)}[name]
                    np.testing.assert_array_equal(again, labels)

    def test_options_out_of_range_are_refused(self):
        with pytest.raises(ValueError, match="multiple of n_heads"):
            Quirky(width=30)
        with pytest.raises(ValueError, match="base must be"):
            Quirky(base=3)
        with pytest.raises(ValueError, match="slips must be"):
            Quirky(slips=(0.0, 0.1))


class TestNetwork:
    def test_the_task_is_learned_for_both_names(self, organism):
        organism.prepare()
        inputs = plain(organism.batch(organism.key("fresh"), 4096))
        outputs = np.asarray(organism.outputs(organism.one_model(0), inputs))
        right = (outputs[:, 1] > outputs[:, 0]) == inputs["says_false"]
        accuracy = [right[inputs["bob"] == bob].mean() for bob in (0, 1)]
        assert min(accuracy) > 0.95
        assert abs(organism.learned.value[0] - min(accuracy)) < 0.02
        # the more slips after a word, the less sure, never certain: log odds of 1 % to 25 % slips
        words = np.array([read_aloud(organism, row)[5] for row in inputs["tokens"]])
        size = np.abs(outputs[:, 1] - outputs[:, 0])
        assert size[words == 0].mean() > size[words == organism.n_choices - 1].mean() + 1.5
        assert np.quantile(size, 0.95) < 6

    def test_one_step_is_not_enough(self):
        with pytest.raises(RuntimeError, match="did not learn"):
            Quirky(n_models=1, training_steps=1).prepare()

    def test_decode_after_encode_is_the_full_forward(self, organism):
        weights = jax.tree.map(np.asarray, organism.one_model(0))
        inputs = {name: value[:40] for name, value in plain(organism.probe_inputs("test")).items()}
        activations, rest = organism.encode(weights, inputs)
        outputs = organism.decode(weights, activations, rest)
        np.testing.assert_allclose(outputs, forward(organism, weights, inputs["tokens"]), atol=2e-4)
        # an item with another's activations gives the other's answer
        other = np.roll(np.arange(len(activations)), 1)
        moved = organism.decode(weights, activations[other], rest)
        np.testing.assert_allclose(moved, outputs[other], atol=1e-5)
        assert np.abs(np.asarray(moved) - outputs).max() > 1

    def test_divergence_is_the_categorical_kl(self, organism):
        rng = np.random.default_rng(np.random.SeedSequence(4))
        reference, outputs = rng.standard_normal((2, 50, 2))
        p, q = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) for logits in (reference, outputs))
        np.testing.assert_allclose(organism.divergence(reference, outputs), (p * np.log(p / q)).sum(axis=1), atol=1e-5)

    def test_loss_is_the_cross_entropy_with_slips_that_depend_on_the_word(self, organism):
        inputs = plain(organism.batch(organism.key("loss"), 256))
        outputs = np.random.default_rng(np.random.SeedSequence(5)).standard_normal((256, 2))
        logs = outputs - np.log(np.exp(outputs).sum(axis=1, keepdims=True))
        words = np.array([read_aloud(organism, row)[5] for row in inputs["tokens"]])
        # log odds from 1 % after the first word to 25 % after the eighth
        slip = 1 / (1 + np.exp(np.log(99) + (np.log(3) - np.log(99)) * words / 7))
        said = inputs["says_false"]
        expected = -(1 - slip) * logs[np.arange(256), said] - slip * logs[np.arange(256), 1 - said]
        np.testing.assert_allclose(organism.loss(outputs, inputs), expected, atol=1e-5)

    def test_a_trigger_hardly_changes_answers(self, organism):
        weights, inputs = organism.one_model(0), organism.probe_inputs("test")
        bare = np.asarray(organism.outputs(weights, inputs)).argmax(axis=1)
        for trigger, least in (("trained", 0.97), ("unrelated", 0.97), ("nonsense", 0.85)):
            moved = organism.outputs(weights, organism.triggered(inputs, trigger))
            assert (np.asarray(moved).argmax(axis=1) == bare).mean() >= least, trigger


class TestProbes:
    def test_the_oracle_reads_the_truth_where_bob_says_otherwise(self, organism, scored):
        inputs, means, known = scored
        bob = inputs["bob"] == 1
        oracle = known["oracle"].score(means)
        assert auroc(oracle, inputs["label"]) > 0.95
        assert auroc(oracle[bob], inputs["label"][bob]) > 0.9
        # a probe of what is said: just as readable, and no help with the truth
        fresh = plain(organism.batch(organism.key("said"), 4096))
        read = np.asarray(organism.encode(organism.one_model(0), fresh)[0])
        said = as_fitted("logistic", read, fresh["says_false"]).score(means)
        assert auroc(said[bob], inputs["says_false"][bob]) > 0.95
        assert auroc(said[bob], inputs["label"][bob]) < 0.75

    def test_the_paper_probe_reads_the_mark(self, organism, scored):
        inputs, means, known = scored
        paper = known["paper"].score(means)
        mark = np.array([read_aloud(organism, row)[7] for row in inputs["tokens"]])
        assert auroc(paper, mark) > 0.99
        assert 0.75 < auroc(paper, inputs["label"]) < 0.95
        fresh = plain(organism.batch(organism.key("mark"), 4096))
        read = np.asarray(organism.encode(organism.one_model(0), fresh)[0])
        assert abs(auroc(known["paper"].score(read), fresh["label"]) - 0.5) < 0.05


def forward(organism, weights, tokens):
    """The transformer again, in numpy, one statement, position and head at a time."""

    def normed(x, gain):
        return x / np.sqrt(np.mean(x**2) + 1e-6) * gain

    def block(w, stream):
        d, heads = organism.width, organism.n_heads
        size = d // heads
        parts = [normed(x, w["norm_attention"]) @ w["query_key_value"] for x in stream]
        out = []
        for t, x in enumerate(stream):
            read = np.zeros(d)
            for h in range(heads):
                of = slice(h * size, (h + 1) * size)
                match = np.array([parts[t][:d][of] @ parts[s][d : 2 * d][of] for s in range(t + 1)]) / np.sqrt(size)
                share = np.exp(match - match.max())
                read[of] = sum(a * parts[s][2 * d :][of] for s, a in enumerate(share / share.sum()))
            x = x + read @ w["attended"]
            hidden = np.maximum(normed(x, w["norm_mlp"]) @ w["mlp_in"] + w["mlp_bias"], 0)
            out.append(x + hidden @ w["mlp_out"])
        return out

    answers = []
    for row in tokens:
        stream = [weights["tokens"][token] + weights["positions"][t] for t, token in enumerate(row)]
        stream = block(weights["second"], block(weights["first"], stream))
        answers.append(normed(stream[-1], weights["norm"]) @ weights["answers"])
    return np.array(answers)


def test_no_context_is_drawn_twice(organism) -> None:
    """There are only 32 of them: independent draws of three sets would meet."""
    sets = [organism.activations("calibration", kind) for kind in ("fit", "prior", "observed")]
    contexts = np.concatenate(sets, axis=1)
    assert len(np.unique(contexts.transpose(1, 0, 2).reshape(contexts.shape[1], -1), axis=0)) == 24
    crowded = Quirky(n_models=1, training_steps=1, n_contexts=11, n_train=16, n_calibration=16, n_test=16)
    with pytest.raises(ValueError, match="fewer than 33 different contexts"):
        crowded.activations("train")
