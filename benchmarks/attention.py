"""Multi-head attention beside bare calls of torch's kernel, our plain formula and torch's module.

Forward time without gradients, causal, float32, one core; the same weights for all. Then 256 words
written one by one through one layer, with the cache and without.

    python benchmarks/attention.py
"""
import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llm_book.attention import KVCache, MultiHeadAttention, causal_mask
from llm_book.lab import record

RUNS, COMMAND = range(11), "python benchmarks/attention.py"
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


def seconds(call: Callable, n: int) -> float:
    """The fastest of `n` calls: other programs on the machine can only add."""
    times = []
    for _ in range(n):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def interleaved(calls: dict[str, Callable], n: int) -> dict[str, np.ndarray]:
    """Seconds of each call, once in every run, in an order that turns."""
    times = {name: [] for name in calls}
    for call in calls.values():
        seconds(call, n)  # warm-up
    for run in RUNS:
        order = [*calls] if run % 2 else [*calls][::-1]
        for name in order:
            times[name].append(seconds(calls[name], n))
    return {name: np.array(values) for name, values in times.items()}


def report(name: str, values: np.ndarray, unit: str, **context) -> None:
    entry = record(f"attention/{name}", values, unit, seeds=list(RUNS), command=COMMAND, cores=1,
                   **context)
    print(f"{name}: {entry['value']:.4g} ± {entry['sd']:.2g} {unit}, median {np.median(values):.4g}")


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    for name, (B, T, D, H) in SIZES.items():
        times = interleaved(contestants(B, T, D, H), n=4 if name == "8x256x384" else 2)
        context = dict(B=B, T=T, D=D, H=H, dtype="float32", causal=True)
        report(f"forward_ms_{name}", 1e3 * times["ours"], "ms", **context)
        report(f"forward_vs_kernel_{name}", times["ours"] / times["bare"], "ratio of times", **context)
        report(f"forward_vs_torch_module_{name}", times["ours"] / times["torch_module"],
               "ratio of times", **context)
        report(f"plain_vs_fused_{name}", times["plain"] / times["ours"], "ratio of times", **context)
    D, H = SIZES["8x256x384"][2:]
    times = interleaved(writers(D, H), n=1)
    report(f"cached_speedup_{WORDS}", times["anew"] / times["cached"], "ratio of times",
           words=WORDS, D=D, H=H, about="one layer, one text, every word fed one by one")


if __name__ == "__main__":
    main()
