"""Tokens per second, one prompt, greedy, beside the `generate` of transformers with the same weights.

At 4 layers of width 128 and at GPT-2's shape (124M), two threads: the plain call `generate(model, ids, n)`,
the same through the model's modules, and a decoder in float16. Then how fast the CPU reads the matrices of
GPT-2's blocks in several number formats, layouts and routines, and what a fused product saves. Weights are random.

    python benchmarks/generate.py
    python benchmarks/generate.py --parts reading fused   (only these)
    python benchmarks/generate.py --parts small --runs 3  (quickly)
    python benchmarks/generate.py --device cuda   (GPT-2's shape only, on a GPU)
"""
import argparse
from collections.abc import Callable
from types import SimpleNamespace

import common
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from llm_book.decoder import Decoder, decoder_for, matrix_vector
from llm_book.generate import generate
from llm_book.gpt import GPT, GPTConfig
from llm_book.hub import weights_from_hf

PROMPT, PARTS = 16, ("small", "reading", "fused", "gpt2")


def same_model(device: str = "cpu", **shape) -> tuple[GPT, GPT2LMHeadModel]:
    """Our GPT and theirs, with the same random weights."""
    torch.manual_seed(0)
    config = GPTConfig(**shape)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.max_len, n_embd=config.d_model,
        n_layer=config.n_layers, n_head=config.n_heads, bos_token_id=None, eos_token_id=None)).eval()
    ours = GPT(config).eval()
    weights_from_hf(ours, "gpt2", dict(theirs.state_dict()))
    return ours.to(device), theirs.to(device)


class Modules(SimpleNamespace):
    """A model behind a wall: `generate` sees no GPT, and asks it module by module."""

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def module_by_module(model: GPT) -> Modules:
    return Modules(model=model, config=model.config, new_cache=model.new_cache, device=model.device, training=False)


def their_generate(model: GPT2LMHeadModel, ids: torch.Tensor, n: int) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
                          pad_token_id=0)


def synchronised(fn: Callable) -> Callable:
    """`fn`, and wait until a GPU has done it."""
    def call():
        result = fn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result
    return call


def side_by_side(bench: common.Bench, key: str, n: int, runs: range, device: str = "cpu", **shape) -> None:
    """Tokens per second of each way, and ratios to transformers'. In float32 all texts must be the same."""
    ours, theirs = same_model(device, **shape)
    ids = torch.randint(shape["vocab_size"], (1, PROMPT), device=device)
    half, modules = Decoder(ours, torch.float16), module_by_module(ours)
    calls = {key: lambda: generate(ours, ids, n, temperature=0),
             f"{key}_modules": lambda: generate(modules, ids, n, temperature=0),
             f"{key}_half": lambda: generate(half, ids, n, temperature=0),
             "transformers": lambda: their_generate(theirs, ids, n)}
    if key == "small":
        del calls[f"{key}_half"]
    texts = {name: call() for name, call in calls.items()}
    if device == "cpu":
        assert all(torch.equal(texts[key], texts[name]) for name in texts if not name.endswith("_half"))
    if f"{key}_half" in texts:
        same = (texts[f"{key}_half"] == texts[key])[0, PROMPT:].int().cumprod(0).sum().item()
        bench.report(f"{key}_half_same", same, "tokens", tokens=n, about="before the first that differs")
    made = common.in_turns({"make": lambda: decoder_for(ours)}, runs, repeat=5)["make"]
    bench.report(f"{key}_make", 1e3 * made, "ms", about="a decoder of the model, as each call makes one", **shape)
    times = common.in_turns({name: synchronised(call) for name, call in calls.items()}, runs)
    peer = times.pop("transformers")
    for name, seconds in times.items():
        bench.report(f"{name}_tokens_per_second", n / seconds, "tokens per second", tokens=n, **shape)
        bench.report(f"{name}_vs_transformers", peer / seconds, "ratio of tokens per second", tokens=n,
                     peer="in float32", **shape)


def small(bench: common.Bench, runs: range) -> None:
    side_by_side(bench, "small", 400, runs, vocab_size=256, max_len=512, n_layers=4, d_model=128, n_heads=4)


def gpt2(bench: common.Bench, runs: range, device: str = "cpu") -> None:
    config = GPTConfig.preset("gpt2")
    shape = {name: getattr(config, name) for name in ("vocab_size", "max_len", "n_layers", "d_model", "n_heads")}
    key, n = ("gpt2", 32) if device == "cpu" else ("gpu", 256)
    side_by_side(bench, key, n, runs, device, **shape)


@torch.inference_mode()
def reading(bench: common.Bench, runs: range) -> None:
    """Milliseconds to multiply one row with all matrices of GPT-2's blocks."""
    D = 768
    weights = [torch.randn(shape) for shape in [(3 * D, D), (D, D), (4 * D, D), (D, 4 * D)] * 12]
    rows = {width: torch.randn(1, width) for width in (D, 4 * D)}

    def product(dtype: torch.dtype, way: str) -> Callable:
        matrices = [w.to(dtype) for w in weights]
        if way == "in_out":
            matrices = [w.T.contiguous().T for w in matrices]
        x = {width: row.to(dtype) for width, row in rows.items()}
        if way == "vector":
            return lambda: [torch.mv(w, x[w.shape[1]][0]) for w in matrices]
        if way == "pieces":
            n = torch.get_num_threads()
            return lambda: [matrix_vector(w, x[w.shape[1]][0], n) for w in matrices]
        return lambda: [F.linear(x[w.shape[1]], w) for w in matrices]

    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    labels = {"out_in": "(out, in)", "in_out": "(in, out)", "vector": "(out, in), as a vector",
              "pieces": "(out, in), in pieces"}
    ways = {f"{name}_{way}": (product(dtype, way), dtype.itemsize, f"{name}, {label}")
            for dtype, name in names.items() for way, label in labels.items()
            if way != "pieces" or dtype == torch.float32}
    ways["sum"] = (lambda: [w.sum() for w in weights], 4, "float32, sum of all")
    times = common.in_turns({key: call for key, (call, _, _) in ways.items()}, runs)
    n_numbers = sum(w.numel() for w in weights)
    for key, (_, size, label) in ways.items():
        bench.report(f"read_{key}", 1e3 * times[key], "ms", label=label, megabytes=size * n_numbers / 1e6)


def three_and_one(D: int, n_layers: int) -> dict[str, Callable]:
    """Queries, keys and values of one token by three products, or by one of stacked matrices."""
    layers = [[torch.randn(D, D) for _ in "qkv"] for _ in range(n_layers)]
    stacks, x, bias = [torch.cat(layer) for layer in layers], torch.randn(D), torch.randn(3 * D)
    biases = bias.split(D)
    return {"three": lambda: [torch.addmv(b, w, x) for layer in layers for b, w in zip(biases, layer)],
            "one": lambda: [torch.addmv(bias, w, x).split(D) for w in stacks]}


@torch.inference_mode()
def fused(bench: common.Bench, runs: range) -> None:
    """Microseconds of both for one layer; all layers in turn, lest one stay in the processor's cache."""
    for D, n_layers in ((128, 4), (768, 12)):
        times = common.in_turns(three_and_one(D, n_layers), runs, repeat=20)
        for name, seconds in times.items():
            bench.report(f"qkv_{D}_{name}", 1e6 * seconds / n_layers, "µs", d_model=D)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(2)
    command = f"python benchmarks/generate.py{' --device cuda' if args.device == 'cuda' else ''}"
    bench = common.Bench("generate", range(args.runs), command, threads=torch.get_num_threads())
    if args.device == "cuda":
        gpt2(bench, range(args.runs), "cuda")
    else:
        for part in args.parts:
            globals()[part](bench, range(args.runs))


if __name__ == "__main__":
    main()
