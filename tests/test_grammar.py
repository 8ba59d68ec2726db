"""The toy world's grammar: its entropy against brute force and against what it writes."""
import itertools
import math
from string import Formatter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_book import grammar as g
from llm_book import text


def enumerate_texts(grammar, symbol):
    """Every derivation: (probability, English, Chinese)."""
    for p, *templates in g.rules(symbol, grammar):
        names = g.children(templates[0])
        for parts in itertools.product(*(list(enumerate_texts(grammar, name)) for name in names)):
            fills = [{name: part[i] for name, part in zip(names, parts)} for i in (1, 2)]
            yield (p * math.prod(part[0] for part in parts),
                   *(template.format(**fill) for template, fill in zip(templates, fills)))


def test_entropy_and_lengths_by_brute_force():
    texts = list(enumerate_texts(g.GRAMMAR, "clause"))
    assert sum(p for p, _, _ in texts) == pytest.approx(1)
    for language in (1, 2):  # unambiguous in both languages
        assert len({text[language] for text in texts}) == len(texts)
    assert g.grammar_entropy("clause") == pytest.approx(-sum(p * math.log2(p) for p, *_ in texts))
    small = {**g.GRAMMAR, "clause": [(1, "{colour}x", "{colour}y"), (2, "z", "w")]}
    texts = list(enumerate_texts(small, "sentence"))
    assert len({english for _, english, _ in texts}) == len(texts)
    assert g.grammar_entropy("sentence", small) == pytest.approx(
        -sum(p * math.log2(p) for p, *_ in texts))
    mean_bytes = sum(p * len(zh.encode()) for p, _, zh in texts)
    measured = g.expected("sentence", lambda p, e, z: len(
        "".join(lit for lit, *_ in Formatter().parse(z)).encode()), small)
    assert measured == pytest.approx(mean_bytes)


def test_both_languages_use_the_same_names():
    for rules in g.GRAMMAR.values():
        for weight, english, chinese in rules:
            assert weight > 0 and sorted(g.children(english)) == sorted(g.children(chinese))


def test_toy_world_is_seeded_and_agrees_with_its_entropy():
    assert g.toy_world(50, seed=1) == g.toy_world(50, seed=1) != g.toy_world(50, seed=2)
    rng = np.random.default_rng(0)
    drawn = [g.derive("sentence", rng) for _ in range(4_000)]
    bits = np.array([b for _, _, b in drawn])
    assert abs(bits.mean() - g.grammar_entropy()) < 4 * bits.std() / math.sqrt(len(bits))
    n_bytes = np.array([len(english.encode()) + 1 for english, _, _ in drawn])
    assert bits.sum() / n_bytes.sum() == pytest.approx(g.toy_entropy("english"), rel=0.02)
    chinese = sum(len(zh.encode()) + 1 for _, zh, _ in drawn)
    assert bits.sum() / chinese == pytest.approx(g.toy_entropy("chinese"), rel=0.02)
    assert bits.sum() / (chinese + n_bytes.sum()) == pytest.approx(g.toy_entropy("both"), rel=0.02)
    with pytest.raises(KeyError, match="latin"):
        g.toy_entropy("latin")


def test_agreement_of_her_and_his():
    women = {english for _, english, _ in g.rules("woman")}
    for line in g.toy_world(2_000, seed=3).splitlines():
        for clause in line.split("\t")[0].rstrip(".").split(" and "):
            clause = clause.removeprefix("today ").removeprefix("in the morning ")
            is_woman = any(clause.startswith(name + " ") for name in women)
            assert (" his " if is_woman else " her ") not in clause


def test_a_rule_names_each_symbol_once():
    with pytest.raises(ValueError, match="each symbol once"):
        g.derive("a", np.random.default_rng(0), {"a": [(1, "{b}{b}", "{b}")], "b": [(1, "x", "y")]})


weights = st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(sum)


@given(weights, st.integers(0, 99))
def test_a_rule_of_weight_0_is_as_good_as_none(weights, seed):
    with_zeros = {"a": [(weight, str(i), str(i)) for i, weight in enumerate(weights)]}
    without = {"a": [rule for rule in with_zeros["a"] if rule[0]]}
    assert g.grammar_entropy("a", with_zeros) == g.grammar_entropy("a", without)
    drawn = [g.derive("a", np.random.default_rng(seed), grammar) for grammar in (with_zeros, without)]
    assert drawn[0] == drawn[1]
    share = np.array([weight / sum(weights) for weight in weights if weight])
    assert g.grammar_entropy("a", with_zeros) == pytest.approx(-(share * np.log2(share)).sum())


@pytest.mark.parametrize("weights", [(-1, 2), (0, 0), (1, math.inf), (1, math.nan), (math.nan, 1), ()])
def test_weights_that_are_no_probabilities_are_refused(weights):
    grammar = {"a": [(weight, "x", "y") for weight in weights]}
    for use in (lambda: g.grammar_entropy("a", grammar),
                lambda: g.derive("a", np.random.default_rng(0), grammar)):
        with pytest.raises(ValueError):
            use()


def test_the_names_that_lived_in_text_are_still_there():
    for name in ("GRAMMAR", "derive", "expected", "grammar_entropy", "toy_entropy", "toy_world"):
        assert getattr(text, name) is getattr(g, name) and name in text.__all__
    assert text.load_corpus("toy_world").text == g.toy_world()
