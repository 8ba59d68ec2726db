"""Models that the tests of chapters 19 and 20 and of the decoder share."""
import math

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llm_book.generate import next_distribution
from llm_book.gpt import GPT, GPTConfig
from llm_book.hub import weights_from_hf

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


class Itself:
    """A model as it is, module by module: nothing looks into it."""

    def __init__(self, model):
        self.model, self.config, self.new_cache = model, model.config, model.new_cache
        self.training, self.device = model.training, model.device

    def __call__(self, ids, cache=None, n_padding=None):
        return self.model(ids, cache=cache, n_padding=n_padding)


class Markov:
    """A model whose next token depends on the last one only: rows of logits."""

    training, device = False, torch.device("cpu")

    def __init__(self, logits):
        self.logits, self.config = logits, GPTConfig(len(logits), 64, 1, 2, 1)

    def new_cache(self, batch_size, max_len=None):
        return []

    def __call__(self, ids, cache=None, n_padding=None):
        return self.logits[ids], None


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prompt(*ids):
    return torch.tensor([ids])


def hf_pair(seed=0, **shape):
    """Our GPT and transformers', with the same random weights."""
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
