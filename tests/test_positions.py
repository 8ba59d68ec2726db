"""Chapter 11: sinusoids, learned, rotary and ALiBi against references, and the shift property."""
import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llm_book.attention import KVCache, MultiHeadAttention, attention_weights
from llm_book.gpt import GPT, GPTConfig
from llm_book.positions import (
    LearnedPositions,
    PositionalEncoding,
    RotaryEmbedding,
    alibi_bias,
    alibi_slopes,
    angles,
    sinusoidal,
)

even = st.integers(1, 16).map(lambda n: 2 * n)
seeds = st.integers(0, 999)
conventions = pytest.mark.parametrize("interleaved", [False, True])


def random(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# sinusoids


@given(st.integers(0, 40), even)
def test_sinusoids_by_brute_force(T, D):
    table = [[(math.cos if j % 2 else math.sin)(t / 10_000 ** ((j - j % 2) / D)) for j in range(D)]
             for t in range(T)]
    assert_close(sinusoidal(T, D), torch.tensor(table).view(T, D), atol=1e-5, rtol=0)


def test_sinusoids_are_those_of_the_tutorial():
    d_model, max_len = 200, 300
    position = torch.arange(max_len).unsqueeze(1)
    div_term = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
    pe = torch.zeros(max_len, 1, d_model)
    pe[:, 0, 0::2] = torch.sin(position * div_term)
    pe[:, 0, 1::2] = torch.cos(position * div_term)
    assert_close(sinusoidal(max_len, d_model), pe[:, 0], atol=1e-4, rtol=0)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200), even)
def test_clocks_compare_by_distance_alone(t, s, shift, D):
    p = sinusoidal(401, D)
    assert_close(p[t] @ p[s], p[t + shift] @ p[s + shift], atol=2e-4 * D, rtol=0)


@given(st.integers(0, 3), st.integers(0, 12), even, seeds)
def test_positional_encoding_adds_them_batch_first(B, T, D, seed):
    x = random(seed, B, T, D)
    encode = PositionalEncoding(D, max_len=12).eval()
    assert_close(encode(x), x + sinusoidal(T, D))
    assert not encode.state_dict() and not list(encode.parameters())


def test_positional_encoding_drops_in_training_only():
    encode = PositionalEncoding(8, dropout=0.5)
    x = random(0, 40, 10, 8)
    torch.manual_seed(0)
    out = encode(x)
    kept = out != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert_close(out[kept], 2 * (x + sinusoidal(10, 8))[kept])
    assert PositionalEncoding(8).dropout.p == 0.1 and PositionalEncoding(8).table.shape == (5000, 8)


def test_dtypes_stay_what_they_are():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = random(0, 2, 5, 8, dtype=dtype)
        for module in (PositionalEncoding(8), RotaryEmbedding(8, 5), RotaryEmbedding(8, 5, 1e4, True),
                       LearnedPositions(5, 8).to(dtype), RotaryEmbedding(8, 5).to(dtype)):
            assert module(x).dtype == dtype


# learned


def test_learned_is_a_lookup():
    learned, x = LearnedPositions(10, 4), random(0, 2, 3, 6, 4)
    assert list(learned.state_dict()) == ["weight"]
    assert_close(learned(x), x + learned.weight[:6])
    places = torch.tensor([[[0, 1, 2, 0, 1, 9]], [[4, 5, 6, 7, 8, 9]]])  # packed, and further on
    assert_close(learned(x, places), x + learned.weight[places])
    learned(x).sum().backward()
    assert_close(learned.weight.grad, torch.tensor([6.0] * 6 + [0.0] * 4)[:, None].expand(10, 4))


# rotary


def by_complex_numbers(x, places, theta):
    """Neighbours as real and imaginary part, times e to the i angle, in double precision."""
    K = x.shape[-1]
    speeds = theta ** (-torch.arange(0, K, 2).double() / K)
    z = torch.view_as_complex(x.double().unflatten(-1, (K // 2, 2)).contiguous())
    turned = z * torch.exp(1j * places.double()[..., None] * speeds)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


@given(st.lists(st.integers(1, 3), max_size=2), st.integers(0, 8), even,
       st.sampled_from([100.0, 10_000.0, 500_000.0]), seeds)
def test_interleaved_by_complex_numbers(shape, T, K, theta, seed):
    x = random(seed, *shape, T, K)
    rope = RotaryEmbedding(K, 60, theta, interleaved=True)
    assert_close(rope(x), by_complex_numbers(x, torch.arange(T), theta), atol=1e-4, rtol=0)
    places = torch.randint(60, (T,), generator=torch.Generator().manual_seed(seed))
    assert_close(rope(x, places), by_complex_numbers(x, places, theta), atol=1e-4, rtol=0)


@given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 8), even, seeds)
def test_the_conventions_differ_by_the_order_of_numbers(shape, T, K, seed):
    x, order = random(seed, *shape, T, K), torch.arange(K).view(-1, 2).T.flatten()
    halves, paired = RotaryEmbedding(K, 8), RotaryEmbedding(K, 8, interleaved=True)
    assert_close(halves(x[..., order]), paired(x)[..., order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K, theta", [(8, 10_000.0), (64, 10_000.0), (128, 500_000.0)])
def test_halves_are_hugging_face_to_the_last_bit(K, theta, dtype):
    config = LlamaConfig(hidden_size=4 * K, num_attention_heads=4, max_position_embeddings=4096,
                         rope_parameters={"rope_type": "default", "rope_theta": theta})
    q, k = random(0, 2, 4, 4096, K, dtype=dtype), random(1, 2, 2, 4096, K, dtype=dtype)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(4096)[None])
    rope = RotaryEmbedding(K, 4096, theta)
    for ours, theirs in zip((rope(q), rope(k)), apply_rotary_pos_emb(q, k, cos, sin)):
        assert_close(ours, theirs, atol=0, rtol=0)


@conventions
@given(t=st.integers(0, 99), s=st.integers(0, 99), shift=st.integers(0, 400), K=even, seed=seeds)
def test_scores_depend_on_the_distance_alone(interleaved, t, s, shift, K, seed):
    q, k = random(seed, 2, 1, K)
    rope = RotaryEmbedding(K, 500, interleaved=interleaved)

    def score(t, s):
        return (rope(q, torch.tensor([t])) * rope(k, torch.tensor([s]))).sum()

    size = (q.norm() * k.norm()).item()
    assert_close(score(t, s), score(t + shift, s + shift), atol=2e-4 * size, rtol=0)


@conventions
@given(T=st.integers(1, 50), K=even, seed=seeds)
def test_turning_keeps_lengths_and_position_zero(interleaved, T, K, seed):
    x, rope = random(seed, 2, T, K), RotaryEmbedding(K, 50, interleaved=interleaved)
    assert_close(rope(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rope(x)[:, 0], x[:, 0])


@conventions
def test_positions_broadcast_and_gradients_flow(interleaved):
    rope, x = RotaryEmbedding(4, 30, interleaved=interleaved), random(0, 2, 3, 6, 4)
    places = torch.randint(30, (2, 1, 6), generator=torch.Generator().manual_seed(0))
    for b in range(2):
        assert_close(rope(x, places)[b], rope(x[b], places[b, 0]))
    assert_close(rope(x, torch.arange(6)), rope(x))
    assert_close(rope(x, torch.arange(6, dtype=torch.int32)), rope(x))
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(rope.double(), x)
    assert not rope.state_dict()


def test_mixed_conventions_lose_the_shift_property():
    q, k = random(3, 2, 1, 8)
    halves, paired = RotaryEmbedding(8, 1000), RotaryEmbedding(8, 1000, interleaved=True)
    near, far = ((halves(q, torch.tensor([t])) * paired(k, torch.tensor([t - 12]))).sum()
                 for t in (17, 917))
    assert abs(near - far) > 0.1


TABLES = {"rotary": lambda: RotaryEmbedding(64, 300), "interleaved": lambda: RotaryEmbedding(64, 300, 500.0, True),
          "sinusoidal": lambda: PositionalEncoding(64, 0.0, 300)}
CASTS = {"bfloat16": lambda m: m.bfloat16(), "half": lambda m: m.half(), "to": lambda m: m.to(torch.bfloat16),
         "double": lambda m: m.double(), "device": lambda m: m.to("meta").to_empty(device="cpu"),
         "inside another": lambda m: torch.nn.Sequential(m).bfloat16()[0]}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("table", TABLES)
def test_tables_lose_nothing_when_a_model_is_cast(table, cast):
    exact, x = TABLES[table](), random(0, 1, 300, 64)
    changed = CASTS[cast](TABLES[table]())
    assert changed.table.dtype == torch.float32 and torch.equal(changed.table, exact.table)
    assert torch.equal(changed.float()(x), exact(x))
    assert torch.equal(changed.bfloat16()(x.bfloat16()), exact(x.bfloat16()))


def test_tables_do_not_depend_on_the_default_dtype():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        born_low = RotaryEmbedding(48, 4096)
    finally:
        torch.set_default_dtype(before)
    assert born_low.table.dtype == torch.float32 and torch.equal(born_low.table, RotaryEmbedding(48, 4096).table)
    assert torch.equal(born_low.table, torch.cat([f(angles(4096, 48)) for f in (torch.cos, torch.sin)], -1))


def llama():
    """A small rotary model whose weights a bfloat16 can hold."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(65, 128, 2, 32, 2, positions="rotary", norm="rms", bias="none")).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


def test_a_model_that_was_in_bfloat16_is_what_it_was(tmp_path):
    model, ids = llama(), torch.randint(65, (2, 100), generator=torch.Generator().manual_seed(0))
    logits = model(ids)[0]
    model.save_pretrained(tmp_path)
    for again in (copy.deepcopy(model).bfloat16().float(), GPT.from_pretrained(tmp_path, dtype=torch.bfloat16).float()):
        assert torch.equal(again.eval()(ids)[0], logits)


def test_all_layers_share_one_table_and_it_goes_with_the_last_of_them():
    one, other = llama(), llama()
    tables = {block.attention.rope.table.data_ptr() for model in (one, other) for block in model.blocks}
    assert len(tables) == 1
    one.bfloat16()
    assert {block.attention.rope.table.data_ptr() for block in one.blocks} == tables
    assert not any("rope" in name for name in one.state_dict())
    rope = RotaryEmbedding(6, 77)
    for same in (RotaryEmbedding(6, 77), RotaryEmbedding(6, 77, interleaved=True), copy.deepcopy(rope).float()):
        assert same.table.data_ptr() == rope.table.data_ptr()
    for different in (RotaryEmbedding(6, 78), RotaryEmbedding(8, 77), RotaryEmbedding(6, 77, 500.0)):
        assert different.table.shape != rope.table.shape or not torch.equal(different.table, rope.table)
    memory = weakref.ref(rope.shared)
    del rope, same
    gc.collect()
    assert memory() is None


def test_tables_made_under_a_mode_do_not_reach_others():
    with torch.inference_mode():
        inside = RotaryEmbedding(10, 33)
    rope, x = RotaryEmbedding(10, 33), random(0, 33, 10).requires_grad_()
    rope(x).sum().backward()  # an inference tensor could not be saved for it
    assert inside.table.data_ptr() == rope.table.data_ptr()
    with FakeTensorMode():
        fake = RotaryEmbedding(10, 33)
        assert fake(torch.zeros(2, 5, 10)).shape == (2, 5, 10)
    with torch.device("meta"):
        assert RotaryEmbedding(10, 33).table.is_meta
    assert type(RotaryEmbedding(10, 33).table) is torch.Tensor and torch.equal(RotaryEmbedding(10, 33)(x), rope(x))


def test_what_a_wrapper_puts_into_a_buffer_stays_in_it():
    """FSDP moves a model by exchanging the data of its parameters and buffers."""
    one, other = RotaryEmbedding(10, 35), RotaryEmbedding(10, 35)
    one.table.data = one.table.double() + 1
    assert one.table.dtype == torch.float64 and other.table.dtype == torch.float32
    assert torch.equal(other.table, RotaryEmbedding(10, 35).table) and torch.equal(one.float().table, other.table)


def test_tables_survive_pickling():
    rope, x = RotaryEmbedding(10, 33), random(0, 33, 10)
    assert torch.equal(pickle.loads(pickle.dumps(rope))(x), rope(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tables_on_a_gpu():
    rope, x = RotaryEmbedding(64, 300), random(0, 300, 64)
    moved = copy.deepcopy(rope).bfloat16().to("cuda").float()
    assert torch.equal(moved.table.cpu(), rope.table) and moved.cpu().table.data_ptr() == rope.table.data_ptr()
    with torch.device("cuda"):
        born = RotaryEmbedding(64, 300)
    assert torch.equal(born.table.cpu(), rope.table)
    assert_close(born(x.cuda()).cpu(), rope(x))


def test_one_step_at_a_time_equals_all_at_once():
    for rope in (RotaryEmbedding(8, 20), RotaryEmbedding(8, 20, interleaved=True)):
        layer, x = MultiHeadAttention(32, 4, 2, rope=rope), random(0, 2, 20, 32)
        cache = KVCache(2, 2, 20, 8)
        with torch.no_grad():
            parts = [layer(x[:, a:b], causal=True, cache=cache) for a, b in ((0, 7), (7, 8), (8, 20))]
            assert_close(torch.cat(parts, 1), layer(x, causal=True))


# ALiBi


def test_slopes_as_published():
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    assert_close(alibi_slopes(16), torch.tensor([2 ** (-n / 2) for n in range(1, 17)]))
    assert alibi_slopes(1).tolist() == [2**-8]
    assert_close(alibi_slopes(12)[8:], torch.tensor([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]))


@given(st.integers(1, 40), st.integers(0, 9))
def test_bias_by_brute_force(H, T):
    slopes, bias = alibi_slopes(H), alibi_bias(H, T)
    assert bias.shape == (H, T, T) and bias.dtype == torch.float32
    for h in range(H):
        for t in range(T):
            for s in range(T):
                assert bias[h, t, s] == -slopes[h] * abs(t - s)


@given(st.integers(1, 70), st.integers(1, 8), seeds)
def test_weights_are_those_of_bloom(H, T, seed):
    """Bloom adds slope · s, which differs by a constant in each row; the softmax drops it."""
    q, k = random(seed, 2, H, T, 4)
    causal = torch.full((T, T), -math.inf).triu(1)
    theirs = build_alibi_tensor(torch.ones(1, T, dtype=torch.long), H, torch.float32)
    assert_close(attention_weights(q, k, alibi_bias(H, T) + causal),
                 attention_weights(q, k, theirs + causal))


def test_bias_combines_with_the_causal_mask_and_a_cache():
    layer, x = MultiHeadAttention(32, 4), random(0, 2, 10, 32)
    bias = alibi_bias(4, 10)
    whole, weights = layer(x, mask=bias[None], causal=True, return_weights=True)
    assert_close(layer(x, mask=bias[None], causal=True), whole)
    assert (weights.triu(1) == 0).all()
    assert_close(layer(x[:, :4], mask=alibi_bias(4, 4)[None], causal=True), whole[:, :4])
    cache = KVCache(2, 4, 10, 8)
    with torch.no_grad():
        layer(x[:, :6], mask=alibi_bias(4, 6)[None], causal=True, cache=cache)
        rest = layer(x[:, 6:], mask=bias[None, :, 6:], causal=True, cache=cache)
    assert_close(rest, whole[:, 6:])


# order is lost, and comes back


@given(seeds)
def test_attention_is_equivariant_until_it_knows_positions(seed):
    torch.manual_seed(seed)
    plain = MultiHeadAttention(16, 2)
    turned = MultiHeadAttention(16, 2, rope=RotaryEmbedding(8, 9))
    x, order = torch.randn(1, 9, 16), torch.arange(9).flip(0).roll(1)
    assert_close(plain(x[:, order]), plain(x)[:, order], atol=1e-5, rtol=1e-4)
    bias, encode = alibi_bias(2, 9), PositionalEncoding(16).eval()
    for attend in (turned, lambda x: plain(x, mask=bias[None]), lambda x: plain(encode(x))):
        assert not torch.allclose(attend(x[:, order]), attend(x)[:, order], atol=1e-4)


# errors and copies


X = torch.zeros(1, 6, 4)


@pytest.mark.parametrize("wrong, message", [
    (lambda: angles(3, 5), "the width, must be even, not 5"),
    (lambda: angles(3, 4, 0.0), "theta must be above 0, not 0.0"),
    (lambda: PositionalEncoding(7), "even"),
    (lambda: RotaryEmbedding(7, 10), "even"),
    (lambda: PositionalEncoding(4, max_len=5)(X), "x must be at most 5 positions long, not 6"),
    (lambda: LearnedPositions(1, 4)(X), "x must be at most 1 positions long, not 6"),
    (lambda: RotaryEmbedding(4, 5)(X), "x must be at most 5 positions long, not 6"),
])
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("module", [LearnedPositions(8, 4), RotaryEmbedding(4, 8)])
@pytest.mark.parametrize("positions", [torch.arange(3, 9), torch.arange(-1, 5)])
def test_positions_without_a_row_are_refused(module, positions):
    with pytest.raises(IndexError):
        module(X, positions)


def test_a_copy_in_another_place_agrees():
    rope = RotaryEmbedding(4, 8)
    assert_close(copy.deepcopy(rope)(X + 1), rope(X + 1))
    with torch.device("meta"):
        assert RotaryEmbedding(4, 8)(torch.zeros(1, 6, 4), torch.arange(6)).shape == (1, 6, 4)
