"""Chapter 10: attention against loops, torch's function and torch's module; masks, groups, cache."""
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llm_book.attention import (
    KVCache,
    MultiHeadAttention,
    attention_weights,
    causal_mask,
    scaled_dot_product_attention,
)
from llm_book.positions import RotaryEmbedding

sizes = st.integers(1, 5)
seeds = st.integers(0, 999)
close = torch.testing.assert_close


def randn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def by_loop(q, k, v, mask):
    """One query at a time, with Python's numbers; `mask` is bool of shape (T, S) or None."""
    rows = []
    for t, query in enumerate(q.tolist()):
        scores = [sum(a * b for a, b in zip(query, key)) / math.sqrt(len(query)) for key in k.tolist()]
        shares = [math.exp(s) if mask is None or mask[t, j] else 0.0 for j, s in enumerate(scores)]
        total = sum(shares) or 1.0
        rows.append([sum(w / total * value[n] for w, value in zip(shares, v.tolist()))
                     for n in range(v.shape[-1])])
    return torch.tensor(rows, dtype=q.dtype)


def random_mask(T, S, seed):
    return torch.rand(T, S, generator=torch.Generator().manual_seed(seed)) < 0.6


@given(sizes, sizes, sizes, sizes, seeds, st.booleans())
def test_equals_a_loop(T, S, K, N, seed, masked):
    q, k, v = (randn(*shape, seed=seed, dtype=torch.float64) for shape in ((T, K), (S, K), (S, N)))
    mask = random_mask(T, S, seed) if masked else None
    close(scaled_dot_product_attention(q, k, v, mask), by_loop(q, k, v, mask))


@given(st.lists(st.integers(0, 3), max_size=3), sizes, sizes, sizes, sizes, seeds, st.data())
def test_any_leading_axes_equal_torch(leading, T, S, K, N, seed, data):
    def some(*last):  # an array whose leading axes may be missing or of length one
        cut = data.draw(st.integers(0, len(leading)))
        axes = [1 if data.draw(st.booleans()) else n for n in leading[cut:]]
        return randn(*axes, *last, seed=seed)

    q, k, v = randn(*leading, T, K, seed=seed), some(S, K), some(S, N)
    kind = data.draw(st.sampled_from(["none", "bool", "float"]))
    mask = {"none": None, "bool": some(T, S) > -0.5, "float": some(T, S)}[kind]
    found = scaled_dot_product_attention(q, k, v, mask)
    assert found.shape == (*leading, T, N)
    k, v = k.expand(*leading, S, K), v.expand(*leading, S, N)
    close(found, F.scaled_dot_product_attention(q, k, v, mask), atol=1e-5, rtol=1e-4)


@given(sizes, sizes, seeds)
def test_weights_are_shares(T, S, seed):
    q, k, mask = randn(T, 4, seed=seed), randn(S, 4, seed=seed + 1), random_mask(T, S, seed)
    for given_mask in (mask, torch.where(mask, 0, -math.inf)):
        weights = attention_weights(q, k, given_mask)
        assert (weights >= 0).all() and (weights[~mask] == 0).all()
        close(weights.sum(-1), mask.any(-1).float())


@pytest.mark.parametrize("as_float", [False, True])
def test_a_closed_row_gives_zeros_and_finite_gradients(as_float):
    q, k, v = (randn(2, 3, 4, seed=i, requires_grad=True) for i in range(3))
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()
    mask = torch.where(mask, 0.0, -math.inf) if as_float else mask
    found = scaled_dot_product_attention(q, k, v, mask)
    assert (found[:, 1] == 0).all() and not (found[:, 0] == 0).any()
    found.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v)) and (q.grad[:, 1] == 0).all()

    layer = MultiHeadAttention(4, 2, bias=True)
    for weights in (False, True):
        out = layer(v.detach(), mask=mask, return_weights=weights)
        out = out[0] if weights else out
        close(out[:, 1], layer.o_proj.bias.expand(2, 4))


@given(seeds)
def test_gradients_equal_torch(seed):
    tensors = [randn(2, 3, 4, seed=seed + i, dtype=torch.float64) for i in range(3)]
    ours, theirs = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
    weights = randn(2, 3, 4, seed=seed, dtype=torch.float64)
    (scaled_dot_product_attention(*ours, causal_mask(3)) * weights).sum().backward()
    (F.scaled_dot_product_attention(*theirs, is_causal=True) * weights).sum().backward()
    for a, b in zip(ours, theirs):
        close(a.grad, b.grad)


def test_large_scores_and_half_precision():
    q = torch.tensor([[1e4, 0.0]])
    found = scaled_dot_product_attention(q, torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([[3.0], [5]]))
    assert found.item() == 3
    q, k, v = (randn(2, 3, 8, seed=i).bfloat16() for i in range(3))
    for mask in (causal_mask(3), torch.zeros(3, 3)):
        found = scaled_dot_product_attention(q, k, v, mask)
        assert found.dtype == torch.bfloat16
        close(found, F.scaled_dot_product_attention(q, k, v, mask), atol=3e-2, rtol=3e-2)


@given(st.integers(1, 9), st.integers(0, 9))
def test_causal_mask(T, before):
    S = T + before
    assert causal_mask(T, S).tolist() == [[s <= t + before for s in range(S)] for t in range(T)]
    assert torch.equal(causal_mask(T), causal_mask(T, T))
    assert torch.equal(causal_mask(S)[-T:], causal_mask(T, S))


def as_torch_module(layer, d_model, n_heads):
    """torch's module with the weights of `layer`, grouped heads copied."""
    theirs = nn.MultiheadAttention(d_model, n_heads, bias=layer.q_proj.bias is not None, batch_first=True)
    group = n_heads // layer.n_kv_heads

    def expand(parameter):
        heads = parameter.unflatten(0, (layer.n_kv_heads, -1))
        return heads.repeat_interleave(group, 0).flatten(0, 1)

    state = {"in_proj_" + name: torch.cat([getattr(layer.q_proj, name), expand(getattr(layer.k_proj, name)),
                                           expand(getattr(layer.v_proj, name))])
             for name in ("weight", "bias") if getattr(layer.q_proj, name) is not None}
    state |= {f"out_proj.{name}": value for name, value in layer.o_proj.state_dict().items()}
    theirs.load_state_dict(state)
    return theirs


heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 3), (2, 1)])


@given(heads, st.integers(1, 3), sizes, sizes, st.booleans(), st.booleans(), seeds)
def test_equals_torch_module(numbers, B, T, S, bias, cross, seed):
    H, n_kv_heads = numbers
    torch.manual_seed(seed)
    layer = MultiHeadAttention(4 * H, H, n_kv_heads, bias=bias)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs = as_torch_module(layer, 4 * H, H)
    x = randn(B, T, 4 * H, seed=seed)
    context = randn(B, S, 4 * H, seed=seed + 1) if cross else None
    source = x if context is None else context
    mask = random_mask(T, source.shape[1], seed) | (torch.arange(source.shape[1]) == 0)
    expected, expected_weights = theirs(x, source, source, attn_mask=~mask, average_attn_weights=False)
    plain, weights = layer(x, context, mask, return_weights=True)
    close(plain, expected, atol=1e-5, rtol=1e-4)
    close(weights, expected_weights, atol=1e-6, rtol=1e-4)
    close(layer(x, context, mask), expected, atol=1e-5, rtol=1e-4)
    if not cross:
        expected = theirs(x, x, x, attn_mask=~causal_mask(T))[0]
        close(layer(x, causal=True), expected, atol=1e-5, rtol=1e-4)


@given(heads, st.booleans(), st.booleans(), st.sampled_from(["none", "bool", "float", "batch"]), seeds)
def test_fused_equals_plain(numbers, causal, rotary, kind, seed):
    H, n_kv_heads = numbers
    torch.manual_seed(seed)
    layer = MultiHeadAttention(10, H, n_kv_heads, head_dim=4, bias=True,
                               rope=RotaryEmbedding(4, 16) if rotary else None)
    x = randn(3, 5, 10, seed=seed)
    mask = {"none": None, "bool": random_mask(5, 5, seed), "float": randn(5, 5, seed=seed),
            "batch": random_mask(15, 5, seed).view(3, 1, 5, 5)}[kind]
    plain, weights = layer(x, mask=mask, causal=causal, return_weights=True)
    assert weights.shape == (3, H, 5, 5)
    close(layer(x, mask=mask, causal=causal), plain, atol=1e-5, rtol=1e-4)


def test_gradients_of_both_roads_agree():
    layer, x = MultiHeadAttention(8, 4, 2), randn(2, 5, 8)
    found = []
    for weights in (False, True):
        layer.zero_grad()
        out = layer(x, causal=True, return_weights=weights)
        (out[0] if weights else out).square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    close(*found)


def test_a_loop_over_heads():
    layer, x = MultiHeadAttention(6, 3, head_dim=4), randn(2, 5, 6)
    parts = []
    for h in range(3):
        q, k, v = (x @ layer.get_submodule(f"{name}_proj").weight[4 * h:4 * h + 4].T for name in "qkv")
        parts.append(scaled_dot_product_attention(q, k, v))
    close(layer(x), torch.cat(parts, -1) @ layer.o_proj.weight.T)


@given(st.integers(1, 5), st.booleans(), st.booleans(), seeds)
def test_the_past_does_not_notice_the_future(cut, rotary, weights, seed):
    torch.manual_seed(seed)
    layer = MultiHeadAttention(8, 2, rope=RotaryEmbedding(4, 8) if rotary else None)
    x = randn(2, 6, 8, seed=seed)
    changed = x.clone()
    changed[:, cut:] = randn(2, 6 - cut, 8, seed=seed + 1)
    a, b = (layer(y, causal=True, return_weights=weights) for y in (x, changed))
    a, b = (a[0], b[0]) if weights else (a, b)
    close(a[:, :cut], b[:, :cut])
    assert not torch.allclose(a[:, cut:], b[:, cut:])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), heads, st.booleans(), st.booleans(),
       st.booleans(), seeds)
def test_cached_equals_uncached_however_chopped(chunks, numbers, rotary, weights, padded, seed):
    (H, n_kv_heads), T = numbers, sum(chunks)
    torch.manual_seed(seed)
    rope = RotaryEmbedding(4, 20, interleaved=seed % 2 == 0) if rotary else None
    layer = MultiHeadAttention(4 * H, H, n_kv_heads, bias=True, rope=rope)
    x, cache = randn(2, T, 4 * H, seed=seed), KVCache(2, n_kv_heads, 20, 4)
    memory = cache.k.data_ptr(), cache.v.data_ptr()
    real = torch.arange(T) >= torch.tensor([0, 1])[:, None] if padded else None  # left padding
    steps, start = [], 0
    with torch.no_grad():
        for part in x.split(chunks, 1):
            end = start + part.shape[1]
            mask = real[:, None, None, :end] if padded else None
            out = layer(part, mask=mask, causal=True, cache=cache, return_weights=weights)
            steps.append(out[0] if weights else out)
            start = end
        whole = layer(x, mask=real[:, None, None] if padded else None, causal=True)
    assert cache.length == T and memory == (cache.k.data_ptr(), cache.v.data_ptr())
    close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-4)


def test_forgetting_the_offset_would_be_noticed():
    """The rotary oracle above can fail: positions that start from zero again give other results."""
    torch.manual_seed(0)
    rope = RotaryEmbedding(4, 20)
    layer, x = MultiHeadAttention(8, 2, rope=rope), randn(1, 6, 8)
    layer.rope = Forgetful(rope)
    cache = KVCache(1, 2, 6, 4)
    with torch.no_grad():
        steps = [layer(part, causal=True, cache=cache) for part in x.split(2, 1)]
        layer.rope = rope
        assert not torch.allclose(torch.cat(steps, 1), layer(x, causal=True), atol=1e-4)


class Forgetful(nn.Module):
    def __init__(self, rope):
        super().__init__()
        self.rope = rope

    def forward(self, x, positions):
        return self.rope(x, positions - positions[0])


def test_rotary_attention_depends_on_distance_only():
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(8, 2, rope=RotaryEmbedding(4, 40)), randn(1, 5, 8)
    cache = KVCache(1, 2, 40, 4)
    with torch.no_grad():
        layer(randn(1, 7, 8), causal=True, cache=cache)
        mask = torch.arange(12) >= 7  # no query attends to what came first
        close(layer(x, mask=mask, causal=True, cache=cache), layer(x, causal=True), atol=1e-5, rtol=1e-4)


def test_norms_of_q_and_k_are_applied_to_each_head():
    torch.manual_seed(0)
    q_norm, k_norm = nn.RMSNorm(4), nn.LayerNorm(4)
    layer, x = MultiHeadAttention(8, 2, q_norm=q_norm, k_norm=k_norm), randn(2, 3, 8)
    q, k, v = (getattr(layer, f"{name}_proj")(x).unflatten(-1, (2, 4)).transpose(1, 2) for name in "qkv")
    expected = F.scaled_dot_product_attention(q_norm(q), k_norm(k), v)
    close(layer(x), layer.o_proj(expected.transpose(1, 2).flatten(2)))


def test_cache_forgets_and_refuses():
    cache, x = KVCache(1, 2, 3, 4), randn(1, 2, 2, 4)
    k, v = cache.update(x, -x)
    assert torch.equal(k, x) and torch.equal(v, -x) and cache.length == 2
    with pytest.raises(ValueError, match=r"max_len must be at least 2 \+ 2 positions, not 3"):
        cache.update(x, x)
    with pytest.raises(RuntimeError, match="no_grad"):
        cache.update(x[:, :, :1].clone().requires_grad_(), x[:, :, :1])
    assert cache.length == 2 and torch.equal(cache.k[:, :, :2], x) and (cache.k[:, :, 2] == 0).all()
    cache.length = 1
    k, _ = cache.update(2 * x, x)
    assert torch.equal(k, torch.cat([x[:, :, :1], 2 * x], 2))
    for other in (randn(2, 2, 1, 4), randn(1, 1, 1, 4), randn(1, 2, 1, 3)):
        with pytest.raises(ValueError, match=r"k and v must be \(1, 2, 1, 4\) in shape, not \("):
            KVCache(1, 2, 3, 4).update(other, other)
    half = KVCache(1, 2, 3, 4, dtype=torch.bfloat16)
    assert half.k.dtype == half.v.dtype == torch.bfloat16


def test_dropout_only_in_training():
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(8, 2, dropout=0.5), randn(2, 6, 8)
    layer.eval()
    close(layer(x), layer(x, return_weights=True)[0])
    expected = layer(x)
    layer.train()
    for weights in (False, True):
        runs = [layer(x, return_weights=weights) for _ in range(2_000)]
        runs = torch.stack([run[0] if weights else run for run in runs])
        assert not torch.equal(runs[0], runs[1])
        close(runs.mean(0), expected, atol=0.05, rtol=0)
    weights = layer(x, return_weights=True)[1]
    close(weights.sum(-1), torch.ones(2, 2, 6))  # shown as they were before any was dropped


def test_names_and_layout_of_the_weights():
    layer = MultiHeadAttention(12, 4, 2, head_dim=5, bias=True, out_bias=False)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "q_proj.weight": (20, 12), "q_proj.bias": (20,), "k_proj.weight": (10, 12), "k_proj.bias": (10,),
        "v_proj.weight": (10, 12), "v_proj.bias": (10,), "o_proj.weight": (12, 20)}
    assert MultiHeadAttention(4, 2).q_proj.bias is None


@pytest.mark.parametrize("wrong, message", [
    (lambda: causal_mask(3, 2), "T must be from 1 to S = 2, not 3"),
    (lambda: causal_mask(0), "T must be from 1"),
    (lambda: attention_weights(randn(2, 4), randn(2, 4), torch.ones(2, 2, dtype=torch.int64)),
     "mask must be bool"),
    (lambda: MultiHeadAttention(4, 2)(randn(1, 2, 4), mask=torch.ones(2, 2, dtype=torch.int64)),
     "mask must be bool"),
    (lambda: MultiHeadAttention(4, 2)(randn(1, 2, 4), randn(1, 2, 4), causal=True), "context must be None"),
    (lambda: MultiHeadAttention(4, 2)(randn(1, 2, 4), randn(1, 2, 4), cache=KVCache(1, 2, 3, 2)),
     "context must be None"),
    (lambda: MultiHeadAttention(4, 2, rope=RotaryEmbedding(2, 4))(randn(1, 2, 4), randn(1, 2, 4)),
     "context must be None"),
    (lambda: MultiHeadAttention(10, 3), "n_heads must be a divisor of 10, not 3"),
])
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 5, 5), (1, 5, 5), (7, 5, 5)])
@pytest.mark.parametrize("weights", [False, True])
def test_a_mask_of_three_axes_is_refused(shape, weights):
    """Where B equals H it could be meant per row or per head, and no shape would tell."""
    for mask in (torch.ones(shape, dtype=torch.bool), torch.zeros(shape)):
        with pytest.raises(ValueError, match=r"mask must be \(B, 1, T, S\) or \(1, H, T, S\), not '3 axes'"):
            MultiHeadAttention(8, 2)(randn(2, 5, 8), mask=mask, return_weights=weights)


@given(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans(), seeds)
def test_four_axes_say_whether_a_mask_is_for_rows_or_for_heads(B, H, causal, weights, seed):
    torch.manual_seed(seed)
    layer, x = MultiHeadAttention(8, H), randn(B, 3, 8, seed=seed)

    def attend(x, mask):
        out = layer(x, mask=mask, causal=causal, return_weights=weights)
        return out[0] if weights else out

    rows = random_mask(3 * B, 3, seed).view(B, 1, 3, 3)
    close(attend(x, rows), torch.cat([attend(x[b:b + 1], rows[b, 0]) for b in range(B)]))
    bias, heads = randn(1, H, 3, 3, seed=seed), []
    for h in range(H):  # the weights of head h are those of a layer in which all heads have its mask
        heads.append(layer(x, mask=bias[:, h:h + 1], causal=causal, return_weights=True)[1][:, h])
    close(layer(x, mask=bias, causal=causal, return_weights=True)[1], torch.stack(heads, 1))
    close(attend(x, bias), layer(x, mask=bias, causal=causal, return_weights=True)[0], atol=1e-5, rtol=1e-4)


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("mask_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("causal", [False, True])
def test_floats_of_any_dtype_are_added(mask_dtype, dtype, causal):
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(32, 4).to(dtype), randn(2, 5, 32).to(dtype)
    mask = randn(5, 5).to(torch.bfloat16).to(mask_dtype)
    found, (plain, _) = (layer(x, mask=mask, causal=causal, return_weights=w) for w in (False, True))
    assert found.dtype == plain.dtype == dtype
    close(found, plain, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)
    close(found, layer(x, mask=mask.to(dtype), causal=causal), atol=0, rtol=0)


def test_a_norm_of_queries_alone():
    layer, x = MultiHeadAttention(8, 2, q_norm=nn.RMSNorm(4)), randn(2, 3, 8)
    q, k, v = (getattr(layer, f"{name}_proj")(x).unflatten(-1, (2, 4)).transpose(1, 2) for name in "qkv")
    expected = F.scaled_dot_product_attention(layer.q_norm(q), k, v)
    close(layer(x), layer.o_proj(expected.transpose(1, 2).flatten(2)))


TRACED = """
import torch
from llm_book.attention import MultiHeadAttention
from llm_book.positions import RotaryEmbedding

layer, kinds = MultiHeadAttention(16, 4, 2, rope=RotaryEmbedding(4, 64)).eval(), ("plain", "masked")

class Causal(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = layer

    def forward(self, x, mask=None):
        return self.layer(x, mask=mask, causal=True)

def inputs(kind, B, T):
    mask = torch.ones(B, 1, 1, T, dtype=torch.bool)
    mask[0, ..., -1] = False
    return (torch.randn(B, T, 16),) + ((mask,) if kind == "masked" else ())

for kind in kinds:
    B, T = torch.export.Dim("B"), torch.export.Dim("T", min=2, max=64)
    shapes = ({0: B, 1: T}, {0: B, 3: T})[:len(inputs(kind, 2, 7))]
    program = torch.export.export(Causal(), inputs(kind, 2, 7), dynamic_shapes=shapes).module()
    compiled = torch.compile(Causal(), fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((3, 9), (4, 20)):
        given = inputs(kind, *size)
        for traced in (program, compiled):
            torch.testing.assert_close(traced(*given), Causal()(*given))
x = torch.randn(3, 7, 16)
each = torch.vmap(lambda row: layer(row[None], causal=True)[0])(x)
torch.testing.assert_close(each, layer(x, causal=True))
"""


def test_exports_compiles_and_vmaps_with_any_length():
    """In a process of its own, because no tracer follows the type checks of these tests."""
    subprocess.run([sys.executable, "-c", TRACED], check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    torch.manual_seed(0)
    layer = MultiHeadAttention(64, 4, 2, rope=RotaryEmbedding(16, 32)).to("cuda", dtype)
    x = torch.randn(2, 9, 64, device="cuda", dtype=dtype)
    cache = KVCache(2, 2, 9, 16, dtype, "cuda")
    with torch.no_grad():
        whole = layer(x, causal=True)
        close(layer(x, causal=True, return_weights=True)[0], whole, atol=3e-2, rtol=3e-2)
        steps = [layer(part, causal=True, cache=cache) for part in x.split([1, 5, 3], 1)]
        close(torch.cat(steps, 1), whole, atol=3e-2, rtol=3e-2)
        closed = torch.zeros(9, 9, dtype=torch.bool, device="cuda")
        assert (layer(x, mask=closed) == 0).all()
