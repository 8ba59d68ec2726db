"""Chapter 03: n-gram models against brute force and NLTK."""
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nltk.lm import KneserNeyInterpolated, Laplace
from nltk.util import everygrams

from llm_book.ngram import SMOOTHINGS, NGramLM, count_ngrams, flat_ids


def brute_force(ids, order, vocab_size, smoothing, context, word, alpha, weight, discount):
    """P(word | context), straight from the definitions, with dictionaries."""
    context = tuple(context)[max(0, len(context) - order + 1):]
    top = len(context) + 1
    uniform = 1 / vocab_size

    def raw(k):
        return Counter(tuple(ids[i:i + k]) for i in range(len(ids) - k + 1))

    def counts(k):
        if smoothing != "kneser-ney" or k == order:
            return raw(k)
        longer = set(raw(k + 1))
        return {gram: sum(other[1:] == gram for other in longer) for gram in raw(k)}

    def level(k, lower):
        table, before = counts(k), context[len(context) - k + 1:]
        after = {gram[-1]: n for gram, n in table.items() if gram[:-1] == before}
        total, types, n = sum(after.values()), sum(c > 0 for c in after.values()), after.get(word, 0)
        if smoothing == "laplace":
            return (n + alpha) / (total + alpha * vocab_size)
        if total == 0:
            return lower
        if smoothing == "mle":
            return n / total
        if smoothing == "interpolated":
            return weight * n / total + (1 - weight) * lower
        return max(n - discount, 0) / total + discount * types / total * lower

    if smoothing in ("mle", "laplace"):
        return level(top, uniform)
    p = uniform
    for k in range(1, top + 1):
        p = level(k, p)
    return p


small = st.lists(st.integers(0, 3), min_size=4, max_size=30)


@given(small, st.integers(1, 4), st.sampled_from(SMOOTHINGS), st.lists(st.integers(0, 4), max_size=5))
def test_probs_equal_brute_force_and_sum_to_one(ids, order, smoothing, context):
    options = dict(alpha=0.5, weight=0.7, discount=0.6)
    model = NGramLM(order, 5, smoothing, **options).fit(ids)
    p = model.probs(context)
    assert p.shape == (5,) and np.isclose(p.sum(), 1) and (p >= 0).all()
    expected = [brute_force(ids, order, 5, smoothing, context, w, **options) for w in range(5)]
    np.testing.assert_allclose(p, expected, atol=1e-12)


@given(small, st.integers(1, 4), st.sampled_from(SMOOTHINGS), st.lists(st.integers(0, 4), max_size=12))
def test_log_prob_is_the_chain_rule(ids, order, smoothing, text):
    model = NGramLM(order, 5, smoothing).fit(ids)
    with np.errstate(divide="ignore"):
        expected = [np.log(model.probs(text[:i])[w]) for i, w in enumerate(text)]
    np.testing.assert_allclose(model.log_probs(text), expected, atol=1e-12)
    assert model.log_prob(text) == pytest.approx(sum(expected))


def test_sums_to_one_for_estimated_discounts():
    rng = np.random.default_rng(0)
    ids = rng.zipf(1.5, 5_000).clip(max=50) - 1
    model = NGramLM(4, 60).fit(ids)
    assert all(0 < level["discount"] < 1 for level in model.levels)
    for context in ([], [59], [1, 2], [0, 0, 0], [0, 59, 0], ids[100:103]):
        p = model.probs(context)
        assert np.isclose(p.sum(), 1) and p.min() > 0


def test_nltk_agrees_on_kneser_ney():
    # NLTK has no uniform floor below order 1. If every word has a left neighbour and all words
    # occur, the floor gives back exactly the discount, so that the definitions agree.
    rng = np.random.default_rng(1)
    words = [str(i) for i in rng.integers(0, 6, 300)]
    words.append(words[0])
    peer = KneserNeyInterpolated(3, discount=0.75)
    peer.fit([list(everygrams(words, max_len=3))], sorted(set(words)))
    model = NGramLM(3, 6, discount=0.75).fit([int(w) for w in words])
    compared = 0
    for a in range(6):
        for b in range(6):
            if peer.counts[[str(a), str(b)]].N() == 0:
                continue
            ours = model.probs([a, b])
            theirs = np.array([peer.score(str(w), [str(a), str(b)]) for w in range(6)])
            unigram = np.array([peer.score(str(w)) for w in range(6)])
            # our order 1 differs by the floor; correct for it and compare what is left
            level3, level2 = model.levels[2], model.levels[1]
            rest = level3["types"][a * 6 + b] * 0.75 / level3["total"][a * 6 + b]
            rest *= level2["types"][b] * 0.75 / level2["total"][b]
            floor = rest * (model.probs([]) - unigram)
            np.testing.assert_allclose(ours - floor, theirs, atol=1e-9)
            compared += 1
    assert compared > 20


def test_nltk_agrees_on_laplace():
    words = "a b a c a b b a".split()
    peer = Laplace(2)
    peer.fit([list(everygrams(words, max_len=2))], ["a", "b", "c"])
    vocab = len(peer.vocab)  # NLTK adds <UNK>
    model = NGramLM(2, vocab, "laplace").fit(["abc".index(w) for w in words])
    for i, context in enumerate("abc"):
        theirs = [peer.score(w, [context]) for w in "abc"]
        np.testing.assert_allclose(model.probs([i])[:3], theirs)


@given(small, st.integers(1, 4))
def test_count_ngrams(ids, order):
    for k, level in enumerate(count_ngrams(np.array(ids), order, 4)[:len(ids)], 1):
        grams = Counter(tuple(ids[i:i + k]) for i in range(len(ids) - k + 1))
        assert sorted(level["counts"]) == sorted(grams.values())
        assert (np.diff(level["keys"]) > 0).all()


def test_works_on_a_large_vocabulary():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 100_000, 2_000)
    model = NGramLM(5, 100_000).fit(ids)
    assert np.isclose(model.probs(ids[:4]).sum(), 1)
    assert model.probs(ids[:4]).argmax() == ids[4]


def test_sample_follows_the_probabilities():
    model = NGramLM(2, 3, "mle").fit([0, 1, 0, 1, 0, 2, 0, 1])
    drawn = model.sample(4_000, np.random.default_rng(0), context=[0])
    assert len(drawn) == 4_000
    after_zero = Counter(b for a, b in zip(drawn, drawn[1:]) if a == 0)
    assert after_zero[0] == 0
    assert after_zero[1] / sum(after_zero.values()) == pytest.approx(3 / 4, abs=0.03)
    again = model.sample(20, np.random.default_rng(5))
    assert again == model.sample(20, np.random.default_rng(5))


@pytest.mark.parametrize("arguments, message", [
    (dict(order=0, vocab_size=3), "order must be at least 1"),
    (dict(order=2, vocab_size=0), "vocab_size must"),
    (dict(order=2, vocab_size=3, smoothing="magic"), "smoothing must be one of"),
    *((dict(order=2, vocab_size=3, alpha=alpha), "alpha must be positive and finite")
      for alpha in (0.0, -1.0, float("inf"), float("nan"), 1e308)),
    (dict(order=2, vocab_size=3, weight=float("nan")), "weight must"),
    (dict(order=2, vocab_size=3, discount=float("nan")), "discount must"),
    (dict(order=2, vocab_size=3, weight=1.5), "weight must"),
    (dict(order=2, vocab_size=3, discount=-0.1), "discount must"),
])
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NGramLM(**arguments)


def test_refuses_ids():
    model = NGramLM(2, 3)
    with pytest.raises(ValueError, match="fitted first"):
        model.probs([0])
    for bad, message in (([0, 3], "from 0 to 2"), ([-1, 0], "from 0 to 2"), (np.array([0.5, 1]), "integers"),
                         ([0], "at least 2")):
        with pytest.raises(ValueError, match=message):
            model.fit(bad)
    assert model.fit([0, 1, 2]).log_prob([]) == 0
    with pytest.raises(ValueError, match="context must"):
        model.probs([7])


def kinds_of(ids):
    return {"list": ids, "tuple": tuple(ids), "iterator": iter(ids), "uint8": np.array(ids, np.uint8),
            "uint64": np.array(ids, np.uint64), "tensor": torch.tensor(ids),
            "int16": torch.tensor(ids, dtype=torch.int16)}


@pytest.mark.parametrize("kind", kinds_of([]))
def test_ids_of_every_kind_count_alike(kind):
    text = [200, 0, 200, 255, 0, 200] * 3
    model = NGramLM(3, 256).fit(kinds_of(text)[kind])
    expected = NGramLM(3, 256).fit(text)
    assert model.log_prob(kinds_of(text)[kind]) == expected.log_prob(text) > -np.inf
    np.testing.assert_array_equal(model.probs(kinds_of([0, 200])[kind]), expected.probs([0, 200]))
    drawn = model.sample(9, np.random.default_rng(0), kinds_of([0, 200])[kind])
    assert drawn == expected.sample(9, np.random.default_rng(0), [0, 200])
    assert all(type(i) is int for i in drawn)


def test_a_tensor_is_read_where_it_is():
    ids = torch.arange(100)  # element by element, a long one would take seconds
    assert np.shares_memory(flat_ids(ids, 100), ids.numpy())
    assert flat_ids([]).dtype == flat_ids(np.zeros((0, 2))).dtype == np.int64


@pytest.mark.parametrize("bad", [[[0, 1]], np.array(3), ["a"], [0.5], [None], torch.ones(2), np.array([True])])
def test_flat_ids_refuses(bad):
    with pytest.raises(ValueError, match="tokens must be a flat sequence of integers"):
        flat_ids(bad, 9, "tokens")
