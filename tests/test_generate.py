"""Chapter 19: distributions against transformers, text against brute force, chi-square for draws."""
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm_book.generate import (
    Decoder,
    _held_back,
    _stop_at,
    _until,
    accept,
    beam_search,
    generate,
    next_distribution,
    pad_left,
    speculative_generate,
    stream,
    stream_text,
)
from llm_book.gpt import GPT, GPTConfig
from llm_book.hub import weights_from_hf
from llm_book.tokens import BPETokenizer, ByteTokenizer, CharTokenizer

SHAPES = {"gpt2": {}, "gpt2-qkv-bias": dict(bias="qkv"),
          "llama": dict(positions="rotary", norm="rms", feed_forward="swiglu", bias="none",
                        n_kv_heads=2, tied=False),
          "qwen3": dict(positions="rotary", norm="rms", feed_forward="swiglu", bias="none",
                        n_kv_heads=1, qk_norm=True, head_dim=6)}


def gpt(kind="gpt2", seed=0, spread=20.0, **changes):
    """A random model whose distributions are far from uniform, so that mistakes show."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=23, max_len=48, n_layers=2, d_model=16, n_heads=4) | SHAPES[kind] | changes
    model = GPT(GPTConfig(**shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.4)
        model.norm.weight.mul_(spread / 10)
    return model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prompt(*ids):
    return torch.tensor([ids])


def hf_pair(seed=0, **shape):
    shape = dict(vocab_size=23, max_len=48, n_layers=2, d_model=16, n_heads=4) | shape
    torch.manual_seed(seed)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=shape["vocab_size"], n_positions=shape["max_len"], n_embd=shape["d_model"],
        n_layer=shape["n_layers"], n_head=shape["n_heads"], bos_token_id=None, eos_token_id=None,
        initializer_range=0.4)).eval()
    ours = GPT(GPTConfig(**shape)).eval()
    weights_from_hf(ours, "gpt2", dict(theirs.state_dict()))
    return ours, theirs


def hf_generate(model, ids, n, **options):
    defaults = dict(do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=n, **(defaults | options))


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


# ---- generating

@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_transformers_token_for_token(seed, penalty):
    ours, theirs = hf_pair(seed)
    ids = torch.randint(23, (2, 5), generator=generator(seed))
    right = hf_generate(theirs, ids, 40, repetition_penalty=penalty)
    for model in (ours, Decoder(ours)):
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
    ids = torch.randint(23, (3, 4), generator=generator())
    runs = [generate(each, ids, 40, use_cache=cached, generator=generator(7), **sampling)
            for each, cached in ((model, False), (model, True), (Decoder(model), True),
                                 (Decoder(model), False))]
    assert runs[0].shape == (3, 44) and torch.equal(runs[0][:, :4], ids)
    for other in runs[1:]:
        assert torch.equal(runs[0], other)


@pytest.mark.parametrize("kind", SHAPES)
def test_decoder_gives_the_models_logits(kind):
    model = gpt(kind, spread=1.0)
    decoder, ids = Decoder(model), torch.randint(23, (2, 20), generator=generator())
    n_padding = torch.tensor([0, 3])
    for padding in (None, n_padding):
        cache = decoder.new_cache(2)
        with torch.no_grad():
            pieces = [decoder(ids[:, :5], cache=cache, n_padding=padding)[0]]
            pieces += [decoder(ids[:, i:i + 1], cache=cache, n_padding=padding)[0] for i in range(5, 20)]
            right = model(ids, n_padding=padding)[0]
        found = torch.cat(pieces, dim=1)
        start = 0 if padding is None else 3
        torch.testing.assert_close(found[:, start:], right[:, start:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoder_in_half_precision_is_near(kind, dtype):
    model = gpt(kind, spread=1.0)
    exact, half, ids = Decoder(model), Decoder(model, dtype), prompt(1, 2, 3)
    logits = []
    for each in (exact, half):
        cache = each.new_cache(1)
        with torch.no_grad():
            each(ids, cache=cache)
            logits.append(each(prompt(4), cache=cache)[0])
    assert logits[1].dtype == torch.float32
    off = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < off < (0.01 if dtype == torch.float16 else 0.08)


def test_decoder_is_a_snapshot():
    model = gpt()
    decoder, before = Decoder(model), generate(model, prompt(1, 2), 10, temperature=0)
    with torch.no_grad():
        model.head.weight.zero_()
    cache = decoder.new_cache(1)
    with torch.no_grad():
        assert decoder(prompt(1), cache=cache)[0].abs().max() > 0
    assert len(before[0]) == 12


@settings(max_examples=12)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), kind=st.sampled_from(list(SHAPES)),
       lean=st.booleans(), penalty=st.sampled_from([1.0, 1.5]))
def test_left_padding_equals_one_at_a_time(lengths, kind, lean, penalty):
    model = gpt(kind)
    model = Decoder(model) if lean else model
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


def pair_distribution(model, ids, **sampling):
    """The exact probability of each pair of next tokens, (V, V)."""
    V = model.config.vocab_size
    with torch.no_grad():
        first = next_distribution(model(ids)[0][:, -1], ids, **sampling)[0]
        longer = torch.cat([ids.expand(V, -1), torch.arange(V)[:, None]], dim=1)
        return first[:, None] * next_distribution(model(longer)[0][:, -1], longer, **sampling)


def check_pairs(pairs, p):
    """Chi-square of pairs against their probabilities; a right program fails once in 100,000 runs."""
    V, n = len(p), len(pairs)
    counts = torch.bincount(pairs[:, 0] * V + pairs[:, 1], minlength=V * V).double()
    p = p.flatten().double()
    assert counts[p == 0].sum() == 0
    rare = (p * n < 5) & (p > 0)
    groups = [(counts[i], p[i] * n) for i in range(V * V) if p[i] * n >= 5]
    if p[rare].sum() * n >= 5:
        groups.append((counts[rare].sum(), p[rare].sum() * n))
    chi_square = sum((found - right)**2 / right for found, right in groups)
    k = len(groups) - 1  # Wilson and Hilferty's approximation of the quantile
    assert k >= 5
    assert chi_square < k * (1 - 2 / (9 * k) + 4.265 * math.sqrt(2 / (9 * k)))**3


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


@pytest.mark.parametrize("sampling", [{}, dict(temperature=1.5, top_k=4, repetition_penalty=1.5)], ids=str)
@pytest.mark.parametrize("n_draft", [1, 3])
def test_speculative_text_has_the_large_models_distribution(n_draft, sampling):
    model, draft = gpt(vocab_size=5, spread=2.0), gpt("llama", seed=5, vocab_size=5, spread=2.0, n_layers=1)
    ids, rng = prompt(1, 2), generator(n_draft)
    exact = pair_distribution(model, ids, **sampling)
    assert (exact - pair_distribution(draft, ids, **sampling)).abs().sum() > 0.3
    # three tokens, so that two guesses fit; the first two are compared
    drawn = torch.cat([speculative_generate(model, draft, ids, 3, n_draft=n_draft, generator=rng, **sampling)
                       for _ in range(600)])
    check_pairs(drawn[:, 2:4], exact)


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
        for model in (ours, Decoder(ours)):
            found = beam_search(model, ids, 12, 4, length_penalty=penalty, eos_id=eos_id)
            assert len(found) == 4
            for (text, score), row, their_score in zip(found, right.sequences, right.sequences_scores):
                assert text.tolist() == row[:len(text)].tolist()
                assert math.isclose(score, their_score.item(), rel_tol=1e-3, abs_tol=1e-4)


def test_one_beam_is_greedy():
    model, ids = gpt(), prompt(4)
    [(text, _)] = beam_search(model, ids, 20, 1)
    assert torch.equal(text[None], generate(model, ids, 20, temperature=0))


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
    found = list(_until(iter(pieces), stop))
    assert "".join(found) == cut("".join(pieces), stop)


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_held_back_is_needed_and_enough(text, stop):
    n = _held_back(text, stop)
    beginnings = {k for s in stop for k in range(1, len(s)) if text.endswith(s[:k])}
    assert n == max(beginnings, default=0)
    assert (_stop_at(text, stop) is None) == (not any(s in text for s in stop))


class Recorded:
    """A model that says the given ids, whatever it reads."""

    training, device = False, torch.device("cpu")

    def __init__(self, ids, vocab_size):
        self.ids, self.config = ids, GPTConfig(vocab_size, 10_000, 1, 2, 1)

    def new_cache(self, batch_size, max_len=None):
        self.place = 0
        return []

    def __call__(self, ids, cache=None, n_padding=None):
        self.place += 1
        logits = torch.zeros(1, ids.shape[1], self.config.vocab_size)
        logits[:, -1, self.ids[self.place - 1]] = 1
        return logits, None


def said(text_or_ids, tokenizer, n=None, **settings):
    ids = tokenizer.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
    model = Recorded(ids, tokenizer.vocab_size)
    return list(stream_text(model, tokenizer, "安", n or len(ids), temperature=0, **settings))


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
    (dict(top_k=0), "top_k must be a whole number of at least 1, not 0"), (dict(top_k=1.5), "top_k must"),
    (dict(top_k=True), "top_k must"), (dict(top_p=0.0), "top_p must be above 0 and at most 1, not 0.0"),
    (dict(top_p=1.01), "top_p must"), (dict(min_p=-0.1), "min_p must be from 0 to 1"),
    (dict(min_p=1.1), "min_p must"), (dict(repetition_penalty=0.0), "repetition_penalty must be above 0"),
    (dict(repetition_penalty=math.inf), "repetition_penalty must")], ids=str)
def test_nonsensical_settings_are_refused_before_any_work(bad, message):
    model, calls = gpt(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    refused(message, stream, model, prompt(1), 5, **bad)  # without asking for a token
    refused(message, generate, model, prompt(1), 5, **bad)
    refused(message, speculative_generate, model, model, prompt(1), 5, **bad)
    assert not calls


def test_requests_that_cannot_work_are_refused():
    model = gpt()
    for fn in (generate, stream, lambda *a, **k: beam_search(*a, 2, **k),
               lambda m, *a, **k: speculative_generate(m, m, *a, **k)):
        refused(r"ids must be whole numbers of shape \(B, T\)", fn, model, torch.zeros(1, 0, dtype=torch.long), 5)
        refused("max_new_tokens must be from 1 to 45 after 3 tokens, since max_len is 48, not 46",
                fn, model, prompt(1, 2, 3), 46)
        refused("max_new_tokens must be from 1 to 45", fn, model, prompt(1, 2, 3), 0)
        refused("max_new_tokens must be from 1 to -1", fn, model, prompt(*[1] * 49), 1)
    assert generate(model, prompt(1, 2, 3), 45).shape == (1, 48)  # up to the last place
    with pytest.raises(IndexError):  # torch's own
        generate(model, prompt(1, 23), 5)
    for bad in ([2], [-1]):
        refused(r"n_padding must be 1 numbers from 0 to 1, not", generate, model, prompt(1, 2), 5,
                n_padding=torch.tensor(bad))
    dropout = gpt(dropout=0.1).train()
    for fn in (lambda m: generate(m, prompt(1), 2), Decoder):
        refused(r"model must be in evaluation mode", fn, dropout)
    generate(gpt().train(), prompt(1), 2)  # without dropout the mode is the same
    with pytest.raises(TypeError, match="topk"):
        stream(model, prompt(1), 5, topk=3)


def test_other_refusals():
    model, byte = gpt(), ByteTokenizer()
    for bad in ([], [[1], []]):
        refused("prompts must be lists of at least one token", pad_left, bad)
    refused("ids must be one row", beam_search, model, prompt(1).expand(2, 1), 5, 2)
    refused("n_beams at least 1 .* 0 and", beam_search, model, prompt(1), 5, 0)
    refused("length_penalty finite", beam_search, model, prompt(1), 5, 2, length_penalty=math.inf)
    refused("both vocabularies equal, not 1 rows, 4, 5 and 23", speculative_generate, model, gpt(vocab_size=5),
            prompt(1), 5)
    refused("n_draft at least 1", speculative_generate, model, model, prompt(1), 5, n_draft=0)
    refused("max_len is 8", speculative_generate, model, gpt(max_len=8), prompt(1), 20)
    refused("stop must be a list of strings that are not empty", stream_text, model, byte, "a", 5, stop="x")
    refused("stop must be a list", stream_text, model, byte, "a", 5, stop=[""])
    refused("ids must be whole numbers", stream_text, model, byte, "", 5)


def test_a_decoder_is_in_training_when_its_model_is():
    model = gpt(dropout=0.5)
    decoder = Decoder(model.eval())
    model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        generate(decoder, prompt(1), 3)
    model.eval()
    assert generate(decoder, prompt(1), 3).shape == (1, 4) and decoder.device == model.device


def test_several_tokens_may_end_a_text():
    model = gpt(seed=2)
    plain = generate(model, prompt(1), 12, temperature=0)[0]
    first = {token: plain.tolist().index(token, 1) for token in set(plain[1:].tolist())}
    a, b = sorted(first, key=first.get)[1:3]
    for run in (lambda eos: generate(model, prompt(1), 12, temperature=0, eos_id=eos)[0],
                lambda eos: speculative_generate(model, model, prompt(1), 12, temperature=0, eos_id=eos)[0],
                lambda eos: beam_search(model, prompt(1), 12, 1, length_penalty=0.0, eos_id=eos)[0][0]):
        assert run([b, a]).tolist() == plain[:first[a] + 1].tolist()
        for wrong in (3_000, [1, -1]):
            with pytest.raises(ValueError, match="eos_id must be tokens from 0 to 22"):
                run(wrong)


@pytest.mark.parametrize("settings, message", [
    ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"min_p": 2.0}, "min_p"),
    ({"top_k": 0}, "top_k"), ({"repetition_penalty": 1.2}, "previous must be given")])
def test_the_distribution_refuses_what_means_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        next_distribution(torch.tensor([[3.0, 2.0, 1.0]]), **settings)
