"""Chapter 19: distributions against transformers, text against brute force, chi-square for draws."""
import math
import time

import numpy as np
import pytest
import torch
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
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm_book.decoder import Decoder
from llm_book.generate import (
    Sampling,
    generate,
    held_back,
    next_distribution,
    pad_left,
    stop_at,
    stop_tokens,
    stream,
    stream_text,
    until,
)
from llm_book.gpt import GPTConfig
from llm_book.tokens import BPETokenizer, ByteTokenizer, CharTokenizer

# ---- distributions

@given(st.integers(0, 10_000), st.sampled_from([0.3, 1.0, 1.7]),
       st.none() | st.integers(1, 30), st.none() | st.floats(0.05, 1.0),
       st.none() | st.floats(0.0, 1.0), st.sampled_from([1.0, 0.7, 1.3]))
def test_distribution_equals_transformers(seed, temperature, top_k, top_p, min_p, penalty):
    torch.manual_seed(seed)
    logits, previous = 3 * torch.randn(3, 20).double(), torch.randint(20, (3, 6))
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty),
                                      TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        processors.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        processors.append(MinPLogitsWarper(min_p))
    theirs = processors(previous, logits.clone()).softmax(-1)
    before = logits.clone()
    ours = next_distribution(logits, previous, temperature=temperature, top_k=top_k, top_p=top_p,
                             min_p=min_p, repetition_penalty=penalty)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(logits, before)
    torch.testing.assert_close(ours.sum(-1), torch.ones(3).double())


def test_transformers_puts_them_in_this_order():
    """The list above is the one that their `generate` builds."""
    _, theirs = hf_pair()
    options = theirs.generation_config.__class__(
        do_sample=True, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    found = theirs._get_logits_processor(options, input_ids_seq_length=1, device="cpu")
    assert [type(processor) for processor in found] == [
        RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper,
        MinPLogitsWarper]


def test_distribution_edge_cases():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert next_distribution(logits, temperature=0).tolist() == [[0, 1, 0, 0]]
    assert (next_distribution(logits, top_k=1) > 0).tolist() == [[False, True, True, False]]  # a tie
    for nothing_cut in ({"top_k": 4}, {"top_k": 99}, {"top_p": 1.0}, {"min_p": 0.0}):
        torch.testing.assert_close(next_distribution(logits, **nothing_cut), logits.softmax(-1))
    assert (next_distribution(logits, top_p=1e-9) > 0).sum() == 1
    assert (next_distribution(logits, min_p=1.0) > 0).tolist() == [[False, True, True, False]]
    torch.testing.assert_close(next_distribution(logits, temperature=1e-3, top_k=3)[0, 1].item(), 0.5)
    half = next_distribution(logits.bfloat16(), top_p=0.9)
    assert half.dtype == torch.float32 and half.sum() == 1


def test_a_long_tail_survives_top_p_of_one_less_a_hair():
    logits = torch.cat([torch.tensor([[20.0]]), torch.zeros(1, 50_000)], dim=1)
    assert (next_distribution(logits, top_p=1.0) > 0).all()


@pytest.mark.parametrize("shares, top_p, kept", [
    ([0.3, 0.1, 0.1, 0.5], 0.8, [0, 3]), ([0.5, 0.25, 0.15, 0.1], 0.75, [0, 1]),
    ([0.4, 0.3, 0.2, 0.1], 0.9, [0, 1, 2]), ([0.1] * 10, 0.3, [0, 1, 2]), ([0.6, 0.4], 0.6, [0])])
def test_what_has_exactly_top_p_is_enough(shares, top_p, kept):
    for dtype in (torch.float32, torch.float64):
        p = next_distribution(torch.tensor([shares], dtype=dtype).log(), top_p=top_p)
        assert len(kept) == (p > 0).sum()
        if len(set(shares)) > 1:
            assert (p[0] > 0).nonzero().flatten().tolist() == kept


@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.integers(1, 8))
def test_top_p_and_min_p_at_a_share_that_is_met_exactly(weights, n):
    total, ranked = sum(weights), sorted(weights, reverse=True)
    logits, n = torch.tensor([[w / total for w in weights]]).log(), min(n, len(weights))
    if sum(ranked[:n]) < total:
        assert (next_distribution(logits, top_p=sum(ranked[:n]) / total) > 0).sum() == n
    found = next_distribution(logits, min_p=ranked[n - 1] / ranked[0]) > 0
    assert found.sum() == sum(w >= ranked[n - 1] for w in weights)


@pytest.mark.parametrize("spread", [1, 3, 5])
@pytest.mark.parametrize("top_p", [0.9, 0.999, 0.9999])
def test_top_p_of_many_small_probabilities(spread, top_p):
    logits = spread * torch.randn(1, 128_000, generator=generator(spread))
    p = logits.double().softmax(-1).sort(descending=True).values
    before = torch.nn.functional.pad(p.cumsum(-1)[:, :-1], (1, 0))
    kept = (next_distribution(logits, top_p=top_p) > 0).sum()
    assert abs(kept - (before < top_p).sum()) <= 2


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-300, 5e-324])
def test_a_temperature_that_is_almost_zero_is_greedy(temperature):
    for row in ([20.0, 19.0, -5.0], [-2e4, -3e38, -math.inf], [0.0, -1e-3, -3e38]):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            p = next_distribution(torch.tensor([row], dtype=dtype), temperature=temperature)
            assert p.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("temperature", [1e5, 1e38, 1e300])
def test_a_huge_temperature_makes_what_is_possible_equal(temperature):
    p = next_distribution(torch.tensor([[20.0, 19.0, -math.inf]]), temperature=temperature)
    torch.testing.assert_close(p, torch.tensor([[0.5, 0.5, 0]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, dict(temperature=0), dict(top_k=1), dict(top_p=0.5),
                                      dict(temperature=0, repetition_penalty=1.2)], ids=str)
def test_logits_that_are_no_numbers_are_an_error(bad, settings):
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 2.0]])
    with pytest.raises(ValueError, match="logits must be numbers"):
        next_distribution(logits, torch.tensor([[0], [0]]), **settings)
    model = Markov(logits[1].repeat(3, 1))
    with pytest.raises(ValueError, match="logits must be numbers"):
        generate(model, prompt(1), 3, **settings)
    with pytest.raises(ValueError, match="logits must be numbers"):
        next_distribution(torch.full((1, 3), -math.inf), torch.tensor([[0]]), **settings)


def test_sampling_is_one_object_and_keywords_change_it():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    sampling = Sampling(temperature=0.5, top_k=2)
    torch.testing.assert_close(next_distribution(logits, None, sampling),
                               next_distribution(logits, temperature=0.5, top_k=2))
    torch.testing.assert_close(next_distribution(logits, None, sampling, top_k=1),
                               next_distribution(logits, temperature=0.5, top_k=1))
    with pytest.raises(AttributeError):
        sampling.top_k = 3
    with pytest.raises(TypeError, match="topk"):
        next_distribution(logits, topk=3)


def test_whole_numbers_of_any_kind_will_do():
    logits = torch.tensor([[1.0, 3.0, 3.5, 2.0]])
    torch.testing.assert_close(next_distribution(logits, top_k=np.int64(3)), next_distribution(logits, top_k=3))
    assert generate(gpt(), prompt(1), 5, top_k=np.int64(3)).shape == (1, 6)
    for eos_id in ({2, 1}, [1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2]), iter([1, 2]), {1: "a", 2: "b"}):
        assert sorted(stop_tokens(eos_id, 5)) == [1, 2]
    for eos_id in (3, np.int64(3), torch.tensor(3), [3, 3], {3}):
        assert stop_tokens(eos_id, 5) == [3]
    assert stop_tokens(None, 5) == stop_tokens([], 5) == []
    for wrong in (1.5, "a", [1.0]):
        with pytest.raises(TypeError):
            stop_tokens(wrong, 5)


# ---- generating

@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_transformers_token_for_token(seed, penalty):
    ours, theirs = hf_pair(seed)
    ids = torch.randint(23, (2, 5), generator=generator(seed))
    right = hf_generate(theirs, ids, 40, repetition_penalty=penalty)
    for model in (ours, Itself(ours)):
        assert torch.equal(generate(model, ids, 40, temperature=0, repetition_penalty=penalty), right)


@pytest.mark.parametrize("seed", range(3))
def test_stop_tokens_equal_transformers(seed):
    ours, theirs = hf_pair(seed)
    ids = torch.randint(23, (3, 4), generator=generator(seed))
    plain = generate(ours, ids, 40, temperature=0)
    eos = [plain[0, 7].item(), plain[1, 12].item()]
    right = hf_generate(theirs, ids, 40, eos_token_id=eos, pad_token_id=eos[0])
    found = generate(ours, ids, 40, temperature=0, eos_id=eos)
    assert torch.equal(found, right) and torch.isin(found[0, 4:8], torch.tensor(eos)).any()
    one = generate(ours, ids[:1], 40, temperature=0, eos_id=eos[0])
    assert one[0, -1] == eos[0] and (one[0, 4:-1] != eos[0]).all()


@pytest.mark.parametrize("sampling", [dict(temperature=0), dict(temperature=0.8, top_p=0.9),
                                      dict(top_k=5, repetition_penalty=1.4)], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_cached_uncached_and_decoder_agree(kind, sampling):
    model = gpt(kind)
    for n_rows in (1, 3):
        ids = torch.randint(23, (n_rows, 4), generator=generator())
        runs = [generate(each, ids, 40, use_cache=cached, generator=generator(7), **sampling)
                for each, cached in ((Itself(model), False), (Itself(model), True), (model, True),
                                     (model, False), (Decoder(model), True))]
        assert runs[0].shape == (n_rows, 44) and torch.equal(runs[0][:, :4], ids)
        for other in runs[1:]:
            assert torch.equal(runs[0], other)


@settings(max_examples=12)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), kind=st.sampled_from(list(SHAPES)),
       lean=st.booleans(), penalty=st.sampled_from([1.0, 1.5]))
def test_left_padding_equals_one_at_a_time(lengths, kind, lean, penalty):
    model = gpt(kind) if lean else Itself(gpt(kind))
    rng = generator(sum(lengths))
    prompts = [torch.randint(23, (n,), generator=rng).tolist() for n in lengths]
    ids, n_padding = pad_left(prompts)
    settings = dict(temperature=0, repetition_penalty=penalty)
    together = generate(model, ids, 15, n_padding=n_padding, **settings)
    uncached = generate(model, ids, 15, n_padding=n_padding, use_cache=False, **settings)
    assert torch.equal(together, uncached)
    for row, n, alone in zip(together, n_padding, prompts):
        assert torch.equal(row[n:], generate(model, torch.tensor([alone]), 15, **settings)[0])


@pytest.mark.parametrize("kind", SHAPES)
def test_padding_changes_no_logit(kind):
    model, ids = gpt(kind, spread=1.0), prompt(5, 6, 7, 8)
    with torch.no_grad():
        right = model(ids)[0]
        for n in (1, 5, 20):
            filled = torch.cat([torch.randint(23, (1, n)), ids], dim=1)
            found = model(filled, n_padding=torch.tensor([n]))[0]
            assert found.isfinite().all()
            torch.testing.assert_close(found[:, n:], right, rtol=1e-4, atol=1e-4)


def test_seeds_decide_and_rows_differ():
    model, ids = gpt(spread=2.0), prompt(1, 2).expand(2, 2)
    runs = [generate(model, ids, 30, generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_stream_gives_tokens_one_by_one_and_leaves_no_mode_behind():
    model, ids = gpt(), prompt(1, 2)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    tokens = stream(model, ids, 10, temperature=0)
    assert not calls
    first = next(tokens)
    assert len(calls) == 1 and first.shape == (1,)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    rest = [first, *tokens]
    assert torch.equal(torch.stack(rest, dim=1), generate(model, ids, 10, temperature=0)[:, 2:])
    model(torch.stack(rest, dim=1))[0].sum().backward()  # what was generated can be trained on
    model(generate(model, ids, 3))[0].sum().backward()


def test_draws_have_the_models_distribution():
    model, ids = gpt(vocab_size=5, spread=2.0), prompt(1, 2)
    drawn = generate(model, ids.expand(20_000, 2), 2, generator=generator(3), temperature=1.3, top_k=4)
    check_pairs(drawn[:, 2:], pair_distribution(model, ids, temperature=1.3, top_k=4))


# ---- text

def cut(text, stop):
    """Brute force: sign by sign, until a stop string is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[:min(starts)]
    return text


@given(st.lists(st.text("ab。", max_size=4), max_size=12), st.lists(st.text("ab。", min_size=1, max_size=4), max_size=3))
def test_stop_strings_do_not_depend_on_borders(pieces, stop):
    found = list(until(iter(pieces), stop))
    assert "".join(found) == cut("".join(pieces), stop)


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_held_back_is_needed_and_enough(text, stop):
    n = held_back(text, stop)
    beginnings = {k for s in stop for k in range(1, len(s)) if text.endswith(s[:k])}
    assert n == max(beginnings, default=0)
    assert (stop_at(text, stop) is None) == (not any(s in text for s in stop))


class Recorded:
    """A model that says the given ids, whatever it reads."""

    training, device = False, torch.device("cpu")

    def __init__(self, ids, vocab_size):
        self.ids, self.config = ids, GPTConfig(vocab_size, 10_000, 1, 2, 1)

    def new_cache(self, batch_size, max_len=None):
        self.step = 0
        return []

    def __call__(self, ids, cache=None, n_padding=None):
        self.step += 1
        logits = torch.zeros(1, ids.shape[1], self.config.vocab_size)
        logits[:, -1, self.ids[self.step - 1]] = 1
        return logits, None


def said(text_or_ids, tokenizer, n=None, **settings):
    ids = tokenizer.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
    model = Recorded(ids, tokenizer.vocab_size)
    return list(stream_text(model, tokenizer, "安", n or len(ids), temperature=0, **settings))


def test_bytes_that_are_no_character_come_at_once():
    byte, model = ByteTokenizer(), Recorded([0xFF] * 5 + [0xE5, 0xAE] + [65, 0x80], 256)
    pieces = stream_text(model, byte, "安", 9, temperature=0)
    for n in range(1, 6):
        assert next(pieces) == "\ufffd" and model.step == n
    assert next(pieces) == "\ufffdA" and model.step == 8  # what had begun could still become one until then
    assert next(pieces) == "\ufffd" and list(pieces) == []


@given(st.lists(st.sampled_from([0x41, 0x80, 0xA5, 0xC3, 0xE5, 0xED, 0xF0, 0x9F, 0xFF]), max_size=16))
def test_streamed_bytes_become_what_they_are_together(ids):
    assert "".join(said([65, *ids], ByteTokenizer())) == ByteTokenizer().decode([65, *ids])


def test_a_stop_string_is_noticed_with_its_last_token():
    byte = ByteTokenizer()
    for stop, text, shown in ((["\ufffd\ufffdx"], [65, 0xFF, 0xFF, 120, 66], "A"), (["ab"], b"xxabyy", "xx"),
                              (["b", "abc"], b"xabcy", "xa"), (["\ufffd"], [65, 0xE5, 66, 67], "A")):
        model = Recorded(list(text), 256)
        end = {"A": {120: 4, 66: 3}.get(text[3] if text[3] == 120 else 66), "xx": 4, "xa": 3}[shown]
        assert "".join(stream_text(model, byte, "a", len(text), temperature=0, stop=stop)) == shown
        assert model.step == end


def test_streaming_takes_linear_time():
    byte = ByteTokenizer()
    seconds = {}
    for n in (1_000, 4_000):
        start = time.perf_counter()
        assert "".join(said([0xFF] * n, byte, stop=["nothing like it"])) == "\ufffd" * n
        seconds[n] = time.perf_counter() - start
    assert seconds[4_000] < 12 * seconds[1_000]  # 4 if linear, 16 if quadratic


TEXT = "安娜在花园里读她的红书。Anna reads her red book in the garden. 👩‍🚀 ok"
TOKENIZERS = [ByteTokenizer(), CharTokenizer(TEXT), BPETokenizer.train(TEXT * 3, 290)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: type(tokenizer).__name__)
def test_streamed_text_is_whole_and_stops(tokenizer):
    pieces = said(TEXT, tokenizer)
    assert "".join(pieces) == TEXT and "\ufffd" not in "".join(pieces) and len(pieces) > 10
    for stop in (["红书"], ["red book", "ed"], ["garden. "], ["nothing"], ["🚀"], ["安"], [TEXT[-1]]):
        assert "".join(said(TEXT, tokenizer, stop=stop)) == cut(TEXT, stop)


def test_streamed_text_of_broken_and_half_characters():
    byte = ByteTokenizer()
    assert "".join(said([0xE5, 0xAE], byte)) == byte.decode([0xE5, 0xAE])
    mixed = [0xFF, 65, 0xE5, 0xAE, 0x89, 0x80, 66]
    assert "".join(said(mixed, byte)) == byte.decode(mixed)


def test_a_stop_token_ends_the_text_and_is_not_shown():
    byte = ByteTokenizer()
    assert "".join(said("abc!def", byte, eos_id=ord("!"))) == "abc"
    assert "".join(said("abc!def", byte, eos_id=[ord("d"), ord("b")])) == "a"


# ---- refusals

def refused(match, fn, *args, **settings):
    with pytest.raises(ValueError, match=match):
        fn(*args, **settings)


@pytest.mark.parametrize("bad, message", [
    (dict(temperature=-0.1), "temperature must be at least 0 and finite, not -0.1"),
    (dict(temperature=math.inf), "temperature must be"), (dict(temperature=math.nan), "temperature must be"),
    (dict(top_k=0), "top_k must be a whole number of at least 1, not 0"),
    (dict(top_k=True), "top_k must"), (dict(top_p=0.0), "top_p must be above 0 and at most 1, not 0.0"),
    (dict(top_p=1.01), "top_p must"), (dict(min_p=-0.1), "min_p must be from 0 to 1"),
    (dict(min_p=1.1), "min_p must"), (dict(repetition_penalty=0.0), "repetition_penalty must be above 0"),
    (dict(repetition_penalty=math.inf), "repetition_penalty must")], ids=str)
def test_nonsensical_settings_are_refused_before_any_work(bad, message):
    model, calls = gpt(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    refused(message, stream, model, prompt(1), 5, **bad)  # without asking for a token
    refused(message, Sampling, **bad)
    refused(message, next_distribution, torch.zeros(1, 3), torch.tensor([[0]]), **bad)
    assert not calls


def test_requests_that_cannot_work_are_refused():
    model = gpt()
    for fn in (generate, stream):
        refused(r"ids must be tokens from 0 to 22 of shape \(B, T\)", fn, model, torch.zeros(1, 0, dtype=torch.long), 5)
        refused("max_new_tokens must be from 1 to 45 after 3 tokens, since max_len is 48",
                fn, model, prompt(1, 2, 3), 46)
        refused("max_new_tokens must be from 1 to 45", fn, model, prompt(1, 2, 3), 0)
        refused("max_new_tokens must be from 1 to -1", fn, model, prompt(*[1] * 49), 1)
    assert generate(model, prompt(1, 2, 3), 45).shape == (1, 48)  # up to the last place
    for bad in (prompt(1, 23), prompt(23), prompt(-1, 2), prompt(1.5), torch.tensor([1, 2])):
        with pytest.raises((ValueError, TypeError), match="ids must be tokens from 0 to 22|parameter 'ids'"):
            stream(model, bad, 5)
    for bad in ([2], [-1]):
        refused(r"n_padding must be 1 numbers from 0 to 1, not", generate, model, prompt(1, 2), 5,
                n_padding=torch.tensor(bad))
    dropout = gpt(dropout=0.1).train()
    for use_cache in (True, False):
        refused(r"model must be in evaluation mode", generate, dropout, prompt(1), 2, use_cache=use_cache)
    generate(gpt().train(), prompt(1), 2)  # without dropout the mode is the same
    with pytest.raises((TypeError, ValueError), match="top_k"):
        Sampling(top_k=1.5)
    with pytest.raises(TypeError, match="topk"):
        stream(model, prompt(1), 5, topk=3)


def test_other_refusals():
    model, byte = gpt(), ByteTokenizer()
    for bad in ([], [[1], []]):
        refused("prompts must be lists of at least one token", pad_left, bad)
    large = gpt(vocab_size=256)
    for bad in ("x", [""], ["a", ""]):
        refused("stop must be a list of strings that are not empty", stream_text, large, byte, "a", 5, stop=bad)
    refused("ids must be tokens", stream_text, large, byte, "", 5)
    refused("tokenizer.vocab_size must be at least the model's, 300, not 256", stream_text,
            gpt(vocab_size=300), byte, "a", 5)
    refused("ids must be tokens from 0 to 22", stream_text, model, byte, "a", 5)


def test_rows_of_other_integers_are_padded():
    ids, n_padding = pad_left([np.array([1, 2, 3], dtype=np.uint16), torch.tensor([4], dtype=torch.int32), (5, 6)])
    assert ids.dtype == torch.int64 and ids.tolist() == [[1, 2, 3], [0, 0, 4], [0, 5, 6]]
    assert n_padding.tolist() == [0, 2, 1]
    for no_tokens in ([[1.5]], [[2.0]], ["12"], [np.array([1.0])]):
        with pytest.raises(TypeError):
            pad_left(no_tokens)


def test_stop_strings_of_any_kind():
    for stop in (["!"], ("!",), {"!"}, iter(["!"]), (s for s in ["!", "?"])):
        assert "".join(said("ab!c", ByteTokenizer(), stop=stop)) == "ab"


def test_several_tokens_may_end_a_text():
    model = gpt(seed=2)
    plain = generate(model, prompt(1), 12, temperature=0)[0]
    first = {token: plain.tolist().index(token, 1) for token in set(plain[1:].tolist())}
    a, b = sorted(first, key=first.get)[1:3]
    for eos_id in ([b, a], {a, b}):
        assert torch.equal(generate(model, prompt(1), 12, temperature=0, eos_id=eos_id)[0], plain[:first[a] + 1])
    for wrong in (3_000, [1, -1]):
        refused("eos_id must be tokens from 0 to 22", generate, model, prompt(1), 12, eos_id=wrong)


@pytest.mark.parametrize("settings, message", [
    ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"min_p": 2.0}, "min_p"),
    ({"top_k": 0}, "top_k"), ({"repetition_penalty": 1.2}, "previous must be given")])
def test_the_distribution_refuses_what_means_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        next_distribution(torch.tensor([[3.0, 2.0, 1.0]]), **settings)
