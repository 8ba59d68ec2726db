"""Chapter 20: beams against brute force and transformers, speculative draws by chi-square."""
import math
from itertools import pairwise, product

import pytest
import torch
from gpts import without_type_checker
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    SHAPES,
    Itself,
    Markov,
    check_pairs,
    generator,
    gpt,
    hf_generate,
    hf_pair,
    pair_distribution,
    prompt,
)

from llm_book.generate import generate
from llm_book.search import accept, beam_search, speculative_generate

# ---- speculative decoding

@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_accept_keeps_the_distribution_exactly(seed):
    """The formula with expectations in place of draws."""
    torch.manual_seed(seed)
    p, q = (torch.randn(2, 6) * 2).softmax(-1)
    more = (p - q).clamp(min=0)
    out = q * torch.minimum(torch.ones(6), p / q) + (1 - torch.minimum(p, q).sum()) * more / more.sum()
    torch.testing.assert_close(out, p)


def test_accept_on_the_edges():
    p, q = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    for seed in range(50):
        assert accept(p, q, torch.tensor(0), generator(seed)) == (torch.tensor(1), False)
        assert accept(p, p, torch.tensor(1), generator(seed)) == (torch.tensor(1), True)


def drawn_pairs(model, draft, n, n_draft, **sampling):
    """The first two of three tokens, so that two guesses fit."""
    rng = generator(n_draft)
    return torch.cat([speculative_generate(model, draft, prompt(1, 2), 3, n_draft=n_draft, generator=rng,
                                           **sampling) for _ in range(n)])[:, 2:4]


@pytest.mark.parametrize("sampling", [{}, dict(temperature=1.5, top_k=4, repetition_penalty=1.5)], ids=str)
@pytest.mark.parametrize("n_draft", [1, 3])
def test_speculative_text_has_the_large_models_distribution(n_draft, sampling):
    model, draft = (Markov(torch.randn(5, 5, generator=generator(seed))) for seed in (0, 1))
    exact = pair_distribution(model, prompt(1, 2), **sampling)
    assert (exact - pair_distribution(draft, prompt(1, 2), **sampling)).abs().sum() > 0.3
    check_pairs(drawn_pairs(model, draft, 600, n_draft, **sampling), exact)


def test_speculative_text_of_models_with_caches_has_the_large_ones_distribution():
    model, draft = gpt(vocab_size=5, spread=2.0), gpt("llama", seed=5, vocab_size=5, spread=2.0, n_layers=1)
    exact = pair_distribution(model, prompt(1, 2))
    assert (exact - pair_distribution(draft, prompt(1, 2))).abs().sum() > 0.3
    check_pairs(drawn_pairs(model, draft, 250, 3), exact)


@pytest.mark.parametrize("n_draft", [1, 2, 5])
@pytest.mark.parametrize("kind", SHAPES)
def test_speculative_greedy_is_the_large_models_text(kind, n_draft):
    model, ids = gpt(kind), prompt(3, 1)
    right = generate(model, ids, 30, temperature=0, repetition_penalty=1.2)
    for draft in (gpt(kind, seed=9), model):
        found = speculative_generate(model, draft, ids, 30, n_draft=n_draft, temperature=0,
                                     repetition_penalty=1.2)
        assert torch.equal(found, right)
    eos = right[0, 9].item()
    assert torch.equal(speculative_generate(model, gpt(kind, seed=9), ids, 30, n_draft=n_draft, eos_id=eos,
                                            temperature=0, repetition_penalty=1.2),
                       generate(model, ids, 30, eos_id=eos, temperature=0, repetition_penalty=1.2))


def test_a_perfect_draft_saves_passes():
    model, calls = gpt(), []
    twin = gpt()
    model.register_forward_hook(lambda *_: calls.append(1))
    speculative_generate(model, twin, prompt(1), 40, n_draft=4, generator=generator())
    assert len(calls) == 8  # five tokens for each


# ---- beams

def all_texts(model, ids, n, eos_id, penalty):
    """Every text that ends or is n tokens long, with its score, the best first."""
    new = torch.tensor(list(product(range(model.config.vocab_size), repeat=n)))
    rows = torch.cat([ids.expand(len(new), -1), new], dim=1)
    with torch.no_grad():
        logp = model(rows)[0][:, ids.shape[1] - 1:-1].log_softmax(-1).gather(-1, new[..., None])[..., 0]
    scored = {}
    for row, parts in zip(rows.tolist(), logp.tolist()):
        text = row[ids.shape[1]:]
        length = text.index(eos_id) + 1 if eos_id in text else n
        scored[tuple(row[:ids.shape[1] + length])] = sum(parts[:length]) / length**penalty
    return sorted(((list(text), score) for text, score in scored.items()), key=lambda text: -text[1])


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("eos_id", [None, 0])
def test_a_beam_wide_enough_finds_the_best_of_all(eos_id, penalty):
    model, ids = gpt(vocab_size=4, spread=3.0), prompt(1, 2)
    found = beam_search(model, ids, 4, 64, length_penalty=penalty, eos_id=eos_id)
    right = all_texts(model, ids, 4, eos_id, penalty)
    assert len(found) == 64
    for (text, score), (best, best_score) in zip(found[:8], right):
        assert text.tolist() == best and math.isclose(score, best_score, rel_tol=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_beams_equal_transformers(seed, penalty):
    ours, theirs = hf_pair(seed)
    ids = torch.randint(1, 23, (1, 4), generator=generator(seed))
    eos = generate(ours, ids, 20, temperature=0)[0, 9].item()
    for eos_id in (None, eos):
        right = hf_generate(theirs, ids, 12, num_beams=4, num_return_sequences=4, early_stopping="never",
                            length_penalty=penalty, eos_token_id=eos_id, pad_token_id=0,
                            return_dict_in_generate=True, output_scores=True)
        for model in (ours, Itself(ours)):
            found = beam_search(model, ids, 12, 4, length_penalty=penalty, eos_id=eos_id)
            assert len(found) == 4
            for (text, score), row, their_score in zip(found, right.sequences, right.sequences_scores):
                assert text.tolist() == row[:len(text)].tolist()
                assert math.isclose(score, their_score.item(), rel_tol=1e-3, abs_tol=1e-4)


def test_one_beam_is_greedy():
    model, ids = gpt(), prompt(4)
    [(text, _)] = beam_search(model, ids, 20, 1)
    assert torch.equal(text[None], generate(model, ids, 20, temperature=0))



FAULT = torch.tensor([[.0001, .4, .3, .2999], [.25] * 4, [.25] * 4, [1e-6, 1e-6, 1e-6, 1 - 3e-6]]).log()


def test_several_stop_tokens_do_not_crowd_out_the_beam_that_goes_on():
    for eos_id in ([1, 2], {2, 1}):
        [(text, score)] = beam_search(Markov(FAULT), prompt(0), 4, 1, eos_id=eos_id)
        assert text.tolist() == [0, 3, 3, 3, 3] and math.isclose(score, -0.3011, abs_tol=1e-4)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sets(st.integers(0, 5), max_size=4), st.integers(1, 4),
       st.sampled_from([0.0, 1.0, 1.5]))
def test_beams_with_many_stop_tokens_equal_a_search_that_sorts_everything(seed, stop, n_beams, penalty):
    logits = 2 * torch.randn(6, 6, generator=generator(seed))
    logp, n_new = logits.double().log_softmax(-1), 5
    live, ended = [([0], 0.0)], []
    for n in range(1, n_new + 1):
        grown = sorted(((text + [token], score + logp[text[-1], token].item())
                        for text, score in live for token in range(6)), key=lambda item: -item[1])
        last = n == n_new
        ended += [(text, score / n**penalty) for text, score in grown[:n_beams] if last or text[-1] in stop]
        ended = sorted(ended, key=lambda item: -item[1])[:n_beams]
        live = [item for item in grown if item[0][-1] not in stop][:n_beams]
    found = beam_search(Markov(logits.double()), prompt(0), n_new, n_beams, length_penalty=penalty, eos_id=stop)
    assert len(found) == len(ended)
    for (text, score), (_, right) in zip(found, ended):  # texts of the same steps in another order tie
        steps = list(pairwise(text.tolist()))
        own = sum(logp[a, b].item() for a, b in steps) / len(steps)**penalty
        assert math.isclose(score, right, abs_tol=1e-4) and math.isclose(score, own, abs_tol=1e-4)
        assert not stop & set(text[1:-1].tolist()) and (len(steps) == n_new or steps[-1][1] in stop)


def test_what_is_impossible_is_not_found():
    logits = torch.tensor([[0.0, 1.0, -math.inf], [-math.inf, -math.inf, 0.0], [0.0, -math.inf, -math.inf]])
    found = beam_search(Markov(logits), prompt(0), 3, 9)
    assert all(math.isfinite(score) for _, score in found)
    assert sorted(text.tolist() for text, _ in found) == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    model = Markov(torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 2.0], [1.0, 1.0, 1.0]]))
    for n_beams in (1, 2, 9):
        with pytest.raises(ValueError, match="logits must be numbers"):
            beam_search(model, prompt(1), 3, n_beams)
    fine = Markov(torch.zeros(3, 3))
    for pair in ((model, fine), (fine, model)):
        for temperature in (0, 1.0):
            with pytest.raises(ValueError, match="logits must be numbers"):
                speculative_generate(*pair, prompt(1), 3, temperature=temperature)


def test_accept_when_rounding_leaves_nothing_to_draw_from():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.75, 0.25, 0.25])  # as if p had lost something
    drawn = {accept(p, q, torch.tensor(0), generator(seed))[0].item() for seed in range(50)}
    assert drawn == {0, 1, 2}


def refused(match, fn, *args, **settings):
    with pytest.raises(ValueError, match=match):
        fn(*args, **settings)


def test_requests_that_cannot_work_are_refused():
    model = gpt()
    for fn in (lambda *a, **k: beam_search(*a, 2, **k), lambda m, *a, **k: speculative_generate(m, m, *a, **k)):
        refused(r"ids must be tokens from 0 to 22 of shape \(B, T\)", fn, model, torch.zeros(1, 0, dtype=torch.long), 5)
        refused("max_new_tokens must be from 1 to 45 after 3 tokens", fn, model, prompt(1, 2, 3), 46)
        refused("max_new_tokens must be from 1 to 45", fn, model, prompt(1, 2, 3), 0)
        refused("ids must be one row", fn, model, prompt(1).expand(2, 1), 5)
        refused("evaluation mode", fn, gpt(dropout=0.1).train(), prompt(1), 5)
        for wrong in (3_000, [1, -1]):
            refused("eos_id must be tokens from 0 to 22", fn, model, prompt(1), 5, eos_id=wrong)
    refused("n_beams must be at least 1, not 0", beam_search, model, prompt(1), 5, 0)
    for bad in (math.inf, math.nan, 1000.0, -11.0):
        refused("length_penalty must be from -10 to 10", beam_search, model, prompt(1), 5, 2, length_penalty=bad)
    refused("draft must be of 23 tokens, not 5", speculative_generate, model, gpt(vocab_size=5), prompt(1), 5)
    refused("max_len is 8", speculative_generate, model, gpt(max_len=8), prompt(1), 20)
    for bad in (dict(temperature=-1.0), dict(top_k=0), dict(top_p=1.5)):
        refused("must be", speculative_generate, model, model, prompt(1), 5, **bad)


def test_ids_of_another_shape_are_refused_and_numbers_of_numpy_are_not():
    printed = without_type_checker("""
from llm_book.generate import generate, stream
from llm_book.search import beam_search, speculative_generate
model = random_model(**GPT2)
for call in (generate, stream, lambda m, i, n: beam_search(m, i, n, 2), lambda m, i, n: speculative_generate(m, m, i, n)):
    for wrong in (torch.tensor(1), torch.tensor([1, 2]), torch.tensor([[[1]]]), torch.zeros(0, 3, dtype=torch.long)):
        try:
            print(call(model, wrong, 3))
        except ValueError as error:
            print(str(error)[:43])
import numpy as np
print(len(beam_search(model, torch.tensor([[1]]), np.int64(3), 2)))
""")
    assert printed == 16 * ["ids must be tokens from 0 to 64 of shape (B"] + ["2"]


def test_extreme_length_penalties_still_rank():
    model = gpt(vocab_size=4, spread=3.0)
    for penalty in (-10.0, 10.0):
        found = beam_search(model, prompt(1, 2), 4, 8, length_penalty=penalty, eos_id=0)
        scores = [score for _, score in found]
        assert all(map(math.isfinite, scores)) and scores == sorted(scores, reverse=True)


def test_several_tokens_may_end_a_text():
    model = gpt(seed=2)
    plain = generate(model, prompt(1), 12, temperature=0)[0]
    first = {token: plain.tolist().index(token, 1) for token in set(plain[1:].tolist())}
    a, b = sorted(first, key=first.get)[1:3]
    for eos_id in ([b, a], {a, b}):
        [(found, _)] = beam_search(model, prompt(1), 12, 1, length_penalty=0.0, eos_id=eos_id)
        assert found.tolist() == plain[:first[a] + 1].tolist()
        found = speculative_generate(model, model, prompt(1), 12, temperature=0, eos_id=eos_id)[0]
        assert found.tolist() == plain[:first[a] + 1].tolist()
