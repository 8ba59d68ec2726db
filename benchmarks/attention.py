"""Multi-head attention beside bare calls of torch's kernel, our plain formula and torch's module.

Forward time without gradients, causal, float32, one core; the same weights for all. Then 256 words
written one by one through one layer, with the cache and without.

    python benchmarks/attention.py
"""
from collections.abc import Callable

import common
import torch
import torch.nn.functional as F
from torch import nn

from llm_book.attention import KVCache, MultiHeadAttention, causal_mask

BENCH = common.Bench("attention", range(11), cores=1)
SIZES = {"8x256x384": (8, 256, 384, 6), "2x1024x768": (2, 1024, 768, 12)}  # B, T, D, H
WORDS = 256  # to write


def bare(layer: MultiHeadAttention) -> Callable:
    """What one would write by hand: four products and the kernel."""
    q, k, v, o = (layer.get_submodule(f"{name}_proj").weight for name in "qkvo")

    def forward(x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        heads = (F.linear(x, weight).view(B, T, layer.n_heads, -1).transpose(1, 2)
                 for weight in (q, k, v))
        found = F.scaled_dot_product_attention(*heads, is_causal=True)
        return F.linear(found.transpose(1, 2).reshape(B, T, D), o)

    return forward


def torch_module(layer: MultiHeadAttention, T: int) -> Callable:
    """torch's own module with the weights of `layer`, without returning the weights of attention."""
    D, mask = layer.o_proj.out_features, ~causal_mask(T)
    module = nn.MultiheadAttention(D, layer.n_heads, bias=False, batch_first=True).eval()
    weights = [layer.get_submodule(f"{name}_proj").weight for name in "qkv"]
    module.load_state_dict({"in_proj_weight": torch.cat(weights),
                            "out_proj.weight": layer.o_proj.weight})
    return lambda x: module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def contestants(B: int, T: int, D: int, H: int) -> dict[str, Callable]:
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(D, H).eval(), torch.randn(B, T, D)
    calls = {"ours": lambda x: layer(x, causal=True), "bare": bare(layer),
             "plain": lambda x: layer(x, causal=True, return_weights=True)[0],
             "torch_module": torch_module(layer, T)}
    for call in calls.values():  # all give the same
        torch.testing.assert_close(call(x), calls["bare"](x), atol=1e-5, rtol=1e-4)
    return {name: lambda call=call: call(x) for name, call in calls.items()}


def writers(D: int, H: int) -> dict[str, Callable]:
    """One text, one word after the other, with the cache and without."""
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(D, H).eval(), torch.randn(1, WORDS, D)

    def cached() -> torch.Tensor:
        cache = KVCache(1, H, WORDS, D // H)
        return torch.cat([layer(x[:, t:t + 1], causal=True, cache=cache) for t in range(WORDS)], 1)

    def anew() -> torch.Tensor:
        return torch.cat([layer(x[:, :t + 1], causal=True)[:, -1:] for t in range(WORDS)], 1)

    torch.testing.assert_close(cached(), anew(), atol=1e-5, rtol=1e-4)
    return {"cached": cached, "anew": anew}


def in_turns(calls: dict[str, Callable], n: int) -> dict:
    """The fastest of `n` calls in every run: other programs on the machine can only add."""
    return common.in_turns(calls, BENCH.runs, rounds=n, best=min)


@torch.no_grad()
def main() -> None:
    common.one_core()
    for name, (B, T, D, H) in SIZES.items():
        times = in_turns(contestants(B, T, D, H), n=4 if name == "8x256x384" else 2)
        context = dict(B=B, T=T, D=D, H=H, dtype="float32", causal=True)
        BENCH.report(f"forward_ms_{name}", 1e3 * times["ours"], "ms", **context)
        BENCH.report(f"forward_vs_kernel_{name}", times["ours"] / times["bare"], "ratio of times", **context)
        BENCH.report(f"forward_vs_torch_module_{name}", times["ours"] / times["torch_module"],
                     "ratio of times", **context)
        BENCH.report(f"plain_vs_fused_{name}", times["plain"] / times["ours"], "ratio of times", **context)
    D, H = SIZES["8x256x384"][2:]
    times = in_turns(writers(D, H), n=1)
    BENCH.report(f"cached_speedup_{WORDS}", times["anew"] / times["cached"], "ratio of times",
                 words=WORDS, D=D, H=H, about="one layer, one text, every word fed one by one")


if __name__ == "__main__":
    main()
