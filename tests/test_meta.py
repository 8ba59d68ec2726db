"""Everything stays on the model's device, without a GPU: models on torch's `meta` device, which has
shapes and no numbers, and a watch over each operation. A table, mask or index that was made on the
CPU meets the others in some operation, and is caught there."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_book import loss
from llm_book.attention import MultiHeadAttention, causal_mask
from llm_book.decoder import Decoder
from llm_book.gpt import CHOICES, GPT, GPTConfig
from llm_book.gpu import checkpoint_blocks, flash_attention
from llm_book.optim import adamw_step, orthogonalise
from llm_book.positions import RotaryEmbedding
from llm_book.transformer import EncoderDecoder, Transformer

SMALL = dict(vocab_size=23, max_len=16, n_layers=2, d_model=16, n_heads=4)
MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)  # may have two devices


class OneDevice(TorchDispatchMode):
    """Refuses an operation on arrays of two devices; single numbers may come from the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        arrays = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
        devices = {x.device.type for x in arrays}
        assert len(devices) < 2 or func in MOVES, f"{func} has arrays on {devices}"
        return func(*args, **(kwargs or {}))


def made_there(make):
    with torch.device("meta"):
        return make()


def moved_there(make):
    return make().to("meta")


ways = pytest.mark.parametrize("way", [made_there, moved_there])


def ids(B=2, T=7):
    return torch.zeros(B, T, dtype=torch.int64, device="meta")


def on_meta(*tensors):
    assert {tensor.device.type for tensor in tensors} == {"meta"}


KINDS = [*({"positions": kind} for kind in CHOICES["positions"]), {"norm": "rms", "n_kv_heads": 2},
         {"positions": "rotary", "norm": "rms", "feed_forward": "swiglu", "bias": "none", "qk_norm": True,
          "n_kv_heads": 2, "tied": False, "dropout": 0.1}]


@ways
@pytest.mark.parametrize("parts", KINDS, ids=str)
def test_gpt(way, parts):
    model = way(lambda: GPT(GPTConfig(**SMALL, **parts)))
    with OneDevice():
        logits, mean = model(ids(), ids())
        mean.backward()
        on_meta(logits, mean, *(p.grad for p in model.parameters()))
        model.eval()
        mask = torch.ones(2, 7, 7, dtype=torch.bool, device="meta")
        on_meta(model(ids(), mask=mask)[0], model.attention_weights(ids()))
        checkpoint_blocks(model.train())(ids(), ids())[1].backward()


@ways
@pytest.mark.parametrize("parts", KINDS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_gpt_with_a_cache(way, parts, padded):
    """By the model itself, and by the decoder that generation uses."""
    model = way(lambda: GPT(GPTConfig(**SMALL, **parts))).eval()
    n_padding = torch.zeros(2, dtype=torch.int64, device="meta") if padded else None
    for read in (model, Decoder(model)):
        with OneDevice(), torch.no_grad():
            cache = model.new_cache(2)
            for T in (5, 1, 1):
                logits, _ = read(ids(T=T), cache=cache, n_padding=n_padding)
                on_meta(logits, *(tensor for part in cache for tensor in (part.k, part.v)))
                assert logits.shape == (2, T, 23)


@ways
def test_transformer(way):
    model = way(lambda: Transformer(23, 16, 4, 2, 32))
    with OneDevice():
        masks = ~causal_mask(7).to("meta"), torch.zeros(2, 7, dtype=torch.bool, device="meta")
        for src_mask, padding in ((None, None), (masks[0], None), masks, (masks[0].float(), masks[1])):
            logits = model(ids(), src_mask, padding)
            F.cross_entropy(logits.mT, ids()).backward()
            on_meta(logits, *(p.grad for p in model.parameters()))


@ways
def test_encoder_decoder(way):
    model = way(lambda: EncoderDecoder(23, 23, 16, 4, 2, 32, shared=True))
    with OneDevice():
        real = torch.ones(2, 9, dtype=torch.bool, device="meta")
        logits = model(ids(T=9), ids(T=5), real)
        F.cross_entropy(logits.mT, ids(T=5)).backward()
        on_meta(logits, *(p.grad for p in model.parameters()))


def test_attention():
    q, k, v = torch.zeros(3, 2, 4, 9, 8, device="meta")
    layer = made_there(lambda: MultiHeadAttention(32, 4, 2, rope=RotaryEmbedding(8, 16)))
    with OneDevice():
        x = torch.zeros(2, 9, 32, device="meta")
        on_meta(layer(x, causal=True), *layer(x, causal=True, return_weights=True), flash_attention(q, k, v))


def test_losses():
    x = torch.zeros(2, 5, 23, device="meta", requires_grad=True)
    with OneDevice():
        for options in ({}, dict(label_smoothing=0.1)):  # "mean" looks whether any target counts
            for reduction in ("sum", "none"):
                on_meta(loss.cross_entropy(x, ids(T=5), reduction=reduction, **options))
        p = loss.softmax(x, -1)
        on_meta(p, loss.log_softmax(x, -1), loss.entropy(p), loss.kl_divergence(p, p))


def test_steps_of_optimizers():
    with OneDevice():
        p, g, m, s = (torch.zeros(8, 4, device="meta") for _ in range(4))
        adamw_step(p, g, m, s, 1, lr=1e-3)
        on_meta(p, orthogonalise(g))


class Careless(nn.Module):
    """Makes its positions on the CPU, which only shows on another device."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 4)

    def forward(self, ids):
        return self.table(torch.arange(ids.shape[1]))


def test_the_watch_sees_what_meta_alone_lets_pass():
    model = made_there(Careless)
    assert model(ids()).device.type == "meta"
    with OneDevice(), pytest.raises(AssertionError, match="has arrays on"):
        model(ids())
