"""Chapter 12: norms, feed-forwards and blocks against torch, in values and gradients."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm_book.attention import KVCache, MultiHeadAttention
from llm_book.block import (
    Block,
    FeedForward,
    LayerNorm,
    RMSNorm,
    SwiGLU,
    gelu_tanh,
    layer_norm,
    rms_norm,
    squared_relu,
)

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
seeds = st.integers(0, 999)


def numbers(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def compare(ours, theirs, *inputs, **tolerance):
    """Values and gradients of two functions of the same tensors, with random weights behind."""
    sides = []
    for fn in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = fn(*leaves)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
        sides.append([y, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*sides, **tolerance)


def copied(layer, **options):
    """Our block with the weights of an `nn.TransformerEncoderLayer`, by formula of the names."""
    D, n_heads = layer.linear1.in_features, layer.self_attn.num_heads
    block = Block(MultiHeadAttention(D, n_heads, bias=True),
                  FeedForward(D, layer.linear1.out_features, layer.activation),
                  lambda: LayerNorm(D, layer.norm1.eps), pre_norm=layer.norm_first, **options)
    state = layer.state_dict()
    names = {"self_attn.out_proj": "attention.o_proj", "linear1": "feed_forward.up",
             "linear2": "feed_forward.down", "norm1": "attention_norm", "norm2": "feed_forward_norm"}
    ours = {f"{new}.{kind}": state[f"{old}.{kind}"] for old, new in names.items()
            for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        for name, part in zip("qkv", state[f"self_attn.in_proj_{kind}"].chunk(3)):
            ours[f"attention.{name}_proj.{kind}"] = part
    block.load_state_dict(ours)
    return block


def gpt2_block(D, H, **options):
    return Block(MultiHeadAttention(D, H, bias=True), FeedForward(D, 4 * D, gelu_tanh),
                 lambda: LayerNorm(D), **options)


def llama_block(D, H, n_kv_heads, d_ff):
    return Block(MultiHeadAttention(D, H, n_kv_heads), SwiGLU(D, d_ff), lambda: RMSNorm(D))


def size(module):
    return sum(p.numel() for p in module.parameters())


@given(shapes, st.integers(1, 6), seeds, st.sampled_from([1e-5, 1e-3, 1.0]), st.booleans())
def test_layer_norm(shape, D, seed, eps, bias):
    x, w, b = numbers(seed, (*shape, D), (D,), (D,))
    inputs = (x, w, b) if bias else (x, w)
    compare(lambda x, w, b=None: layer_norm(x, w, b, eps),
            lambda x, w, b=None: F.layer_norm(x, (D,), w, b, eps), *inputs)
    module = LayerNorm(D, eps, bias).double()
    with torch.no_grad():
        module.weight.copy_(w)
        if bias:
            module.bias.copy_(b)
    compare(module, lambda x: layer_norm(x, *(i.detach() for i in inputs[1:]), eps=eps), x)
    assert (module.bias is None) != bias


@given(shapes, st.integers(1, 6), seeds, st.sampled_from([1e-6, 1e-3, 1.0]))
def test_rms_norm(shape, D, seed, eps):
    x, w = numbers(seed, (*shape, D), (D,))
    compare(lambda x, w: rms_norm(x, w, eps), lambda x, w: F.rms_norm(x, (D,), w, eps), x, w)
    module = RMSNorm(D, eps).double()
    with torch.no_grad():
        module.weight.copy_(w)
    compare(module, lambda x: rms_norm(x, w, eps), x)


def test_norms_match_torch_modules_by_default():
    x, = numbers(0, (2, 3, 8), dtype=torch.float32)
    compare(LayerNorm(8), nn.LayerNorm(8), x)
    compare(RMSNorm(8), nn.RMSNorm(8, eps=1e-6), x)
    assert LayerNorm(8).state_dict().keys() == nn.LayerNorm(8).state_dict().keys()
    assert RMSNorm(8).state_dict().keys() == nn.RMSNorm(8).state_dict().keys()


def test_rms_norm_keeps_bfloat16_as_it_is(recwarn):
    x = torch.randn(4, 8).bfloat16()
    found = RMSNorm(8)(x)
    assert found.dtype == torch.bfloat16 and not recwarn.list
    torch.testing.assert_close(found.float(), rms_norm(x.float(), torch.ones(8), 1e-6), rtol=2**-8, atol=0)


@given(seeds, st.integers(2, 8), st.floats(-9, 9), st.floats(0.5, 9))
def test_what_the_norms_do_not_see(seed, D, shift, scale):
    x, = numbers(seed, (4, D))
    ones = torch.ones(D, dtype=torch.float64)
    u, v = layer_norm(x, ones, eps=0.0), rms_norm(x, ones, eps=0.0)
    torch.testing.assert_close(u.mean(-1), torch.zeros(4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(u.var(-1, correction=0), torch.ones(4).double())
    torch.testing.assert_close(v.square().mean(-1), torch.ones(4).double())
    torch.testing.assert_close(layer_norm(scale * x + shift, ones, eps=0.0), u)
    torch.testing.assert_close(rms_norm(scale * x, ones, eps=0.0), v)
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(rms_norm(centred, ones, eps=0.0), u)  # mean 0: the same


def test_equal_and_zero_rows_have_finite_gradients():
    for row in (torch.zeros(1, 4), torch.full((1, 4), 3.0)):
        for fn in (lambda x: layer_norm(x, torch.ones(4)), lambda x: rms_norm(x, torch.ones(4)),
                   LayerNorm(4), RMSNorm(4)):
            x = row.clone().requires_grad_()
            fn(x).sum().backward()
            assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow_in_the_classes(dtype):
    x = torch.tensor([[500.0, 1100, 1300, 1900]])
    for module in (LayerNorm(4), RMSNorm(4)):
        y = module.to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), module.float()(x.to(dtype).float()), rtol=1e-2, atol=1e-2)
    assert not rms_norm(x.half(), torch.ones(4).half()).any()  # as the page says


def test_squared_relu():
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    compare(squared_relu, lambda x: torch.where(x > 0, x * x, 0.0), x)


def test_gelu_tanh():
    x = torch.linspace(-8, 8, 401, dtype=torch.float64)
    formula = lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    compare(gelu_tanh, formula, x)
    assert 1e-4 < (gelu_tanh(x) - F.gelu(x)).abs().max() < 1e-3


@given(shapes, seeds, st.booleans(), st.sampled_from([F.gelu, F.relu, gelu_tanh, torch.tanh]))
def test_feed_forward(shape, seed, bias, activation):
    x, = numbers(seed, (*shape, 3))
    ff = FeedForward(3, 5, activation, bias).double()
    up, down = ff.up, ff.down
    assert (up.bias is not None) == (down.bias is not None) == bias
    b, c = (up.bias.detach(), down.bias.detach()) if bias else (0.0, 0.0)
    up, down = up.weight.detach(), down.weight.detach()
    compare(ff, lambda x: activation(x @ up.mT + b) @ down.mT + c, x)


@given(shapes, seeds)
def test_swiglu(shape, seed):
    x, = numbers(seed, (*shape, 3))
    ff = SwiGLU(3, 5).double()
    gate, up, down = (layer.weight.detach() for layer in (ff.gate, ff.up, ff.down))

    def by_hand(x):
        g = x @ gate.mT
        return (g / (1 + torch.exp(-g)) * (x @ up.mT)) @ down.mT

    compare(ff, by_hand, x)
    assert {*ff.state_dict()} == {"gate.weight", "up.weight", "down.weight"}


def test_swiglu_equals_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = pytest.importorskip("transformers").LlamaConfig(hidden_size=8, intermediate_size=20,
                                                                    num_attention_heads=2)
    x, = numbers(0, (2, 3, 8), dtype=torch.float32)
    theirs, ours = llama.LlamaMLP(config), SwiGLU(8, 20)
    ours.load_state_dict({f"{name}.weight": theirs.state_dict()[f"{name}_proj.weight"]
                          for name in ("gate", "up", "down")})
    compare(ours, theirs, x)
    compare(RMSNorm(8, 1e-5), llama.LlamaRMSNorm(8, 1e-5), x)


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("T", [1, 5])
def test_block_equals_torch(pre_norm, activation, T):
    theirs = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, activation=activation,
                                        batch_first=True, norm_first=pre_norm).double()
    ours = copied(theirs).double()
    x, = numbers(0, (3, T, 16))
    compare(ours, theirs, x)
    assert size(ours) == size(theirs)
    mask = torch.ones(T, T, dtype=torch.bool).tril()  # ours: True may attend; theirs: True may not
    for call in (lambda x: ours(x, mask), lambda x: ours(x, causal=True)):
        compare(call, lambda x: theirs(x, src_mask=~mask), x)
    for block in (ours, theirs):  # gradients of the weights, too
        block.zero_grad()
        block(x).backward(numbers(1, x.shape)[0])
    torch.testing.assert_close(ours.feed_forward.up.weight.grad, theirs.linear1.weight.grad)
    torch.testing.assert_close(ours.attention.k_proj.weight.grad,
                               theirs.self_attn.in_proj_weight.grad[16:32])
    torch.testing.assert_close(ours.attention_norm.weight.grad, theirs.norm1.weight.grad)


def test_padding_mask_equals_torch():
    theirs = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    x, = numbers(0, (2, 5, 16), dtype=torch.float32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    compare(lambda x: copied(theirs)(x, ~padding[:, None, None]),
            lambda x: theirs(x, src_key_padding_mask=padding), x)


@pytest.mark.parametrize("pre_norm", [True, False])
@given(T=st.integers(2, 7), seed=seeds)
def test_the_future_cannot_leak(pre_norm, T, seed):
    block = gpt2_block(16, 4, pre_norm=pre_norm)
    x, y = numbers(seed, (2, T, 16), (2, T, 16), dtype=torch.float32)
    cut = seed % (T - 1) + 1
    changed = torch.cat((x[:, :cut], y[:, cut:]), 1)
    torch.testing.assert_close(block(changed, causal=True)[:, :cut], block(x, causal=True)[:, :cut])
    assert not torch.allclose(block(changed)[:, :cut], block(x)[:, :cut])


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_cached_equals_uncached(pre_norm, n_kv_heads):
    block = Block(MultiHeadAttention(16, 4, n_kv_heads), SwiGLU(16, 24), lambda: RMSNorm(16),
                  pre_norm=pre_norm)
    x, = numbers(0, (2, 6, 16), dtype=torch.float32)
    cache = KVCache(2, n_kv_heads, 6, 4)
    with torch.no_grad():
        parts = [block(part, causal=True, cache=cache) for part in x.split([3, 1, 2], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), block(x, causal=True))


def test_silent_parts_leave_the_stream_alone():
    for pre_norm in (True, False):
        block = Block(MultiHeadAttention(16, 4), SwiGLU(16, 24), lambda: RMSNorm(16), pre_norm=pre_norm)
        for last in (block.attention.o_proj, block.feed_forward.down):
            nn.init.zeros_(last.weight)
        x, = numbers(0, (2, 3, 16), dtype=torch.float32)
        assert torch.equal(block(x), x) == pre_norm


def test_each_block_has_norms_of_its_own():
    block = gpt2_block(16, 4)
    assert block.attention_norm is not block.feed_forward_norm
    assert {name.split(".")[0] for name in block.state_dict()} == {
        "attention", "feed_forward", "attention_norm", "feed_forward_norm"}


def test_dropout_acts_in_training_only():
    x, = numbers(0, (2, 3, 16), dtype=torch.float32)
    ff, block = FeedForward(16, 64, dropout=0.5), gpt2_block(16, 4, dropout=0.5)
    for module in (ff, block):
        module.train()
        assert not torch.equal(module(x), module(x))
        module.eval()
        assert torch.equal(module(x), module(x))
    torch.manual_seed(0)
    wide = FeedForward(4, 4000, torch.ones_like, bias=False, dropout=0.25).train()
    with torch.no_grad():
        wide.down.weight.fill_(1)
        assert abs(wide(x[..., :4]).mean() - 4000) < 100  # what is left is scaled up


@pytest.mark.parametrize("D, H, T", [(16, 4, 5), (48, 4, 20), (8, 1, 1)])
def test_parameters_and_flops_by_formula(D, H, T):
    n_kv_heads, d_ff = 1, 3 * D
    kv = n_kv_heads * D // H
    for block, parameters, flops in (
            (gpt2_block(D, H), 12 * D**2 + 13 * D, 24 * D**2 + 4 * T * D),
            (llama_block(D, H, n_kv_heads, d_ff), 2 * D**2 + 2 * D * kv + 3 * D * d_ff + 2 * D,
             4 * D**2 + 4 * D * kv + 6 * D * d_ff + 4 * T * D)):
        assert size(block) == parameters
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            block(torch.zeros(2, T, D), causal=True)
        assert counter.get_total_flops() == 2 * T * flops


@pytest.mark.parametrize("make, error", [
    (lambda: LayerNorm(-1), RuntimeError), (lambda: RMSNorm(-1), RuntimeError),
    (lambda: FeedForward(4, -4), RuntimeError), (lambda: SwiGLU(4, -4), RuntimeError),
    (lambda: FeedForward(4, 4, dropout=1.1), ValueError), (lambda: FeedForward(4, 4, dropout=-0.1), ValueError),
    (lambda: gpt2_block(16, 4, dropout=1.5), ValueError),
])
def test_torch_refuses(make, error):
    """What has no guard of ours, because torch says it."""
    with pytest.raises(error):
        make()
