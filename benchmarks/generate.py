"""Tokens per second, one prompt, greedy, beside the `generate` of transformers with the same weights.

At 4 layers of width 128 and at GPT-2's shape (124M), two threads; and how fast the CPU reads the
matrices of GPT-2's blocks in several layouts and number formats. Weights are random.

    python benchmarks/generate.py
    python benchmarks/generate.py --device cuda   (GPT-2's shape only, on a GPU)
"""
import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from llm_book.generate import Decoder, generate
from llm_book.gpt import GPT, GPTConfig
from llm_book.hub import weights_from_hf
from llm_book.lab import record

PROMPT = 16
COMMAND = "python benchmarks/generate.py"


def report(name: str, values: list[float], unit: str, command: str = COMMAND, **context) -> None:
    record(f"generate/{name}", values, unit, seeds=range(len(values)), command=command,
           threads=torch.get_num_threads(), **context)
    print(f"{name}: median {np.median(values):.4g}, {min(values):.4g} … {max(values):.4g} {unit}",
          flush=True)


def seconds(fn: Callable) -> float:
    start = time.perf_counter()
    fn()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def same_model(**shape) -> tuple[GPT, GPT2LMHeadModel]:
    """Our GPT and theirs, with the same random weights."""
    torch.manual_seed(0)
    config = GPTConfig(**shape)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.max_len, n_embd=config.d_model,
        n_layer=config.n_layers, n_head=config.n_heads, bos_token_id=None, eos_token_id=None)).eval()
    ours = GPT(config).eval()
    weights_from_hf(ours, "gpt2", dict(theirs.state_dict()))
    return ours, theirs


def their_generate(model: GPT2LMHeadModel, ids: torch.Tensor, n: int) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
                          pad_token_id=0)


def side_by_side(n: int, repetitions: int, runs: dict[str, Callable], command: str = COMMAND,
                 **context) -> None:
    """Record tokens per second of each, measured in turns, and the ratio to the last."""
    rates = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, fn in runs.items():
            rates[name].append(n / seconds(fn))
    *ours, peer = rates
    for name in ours:
        ratios = [a / b for a, b in zip(rates[name], rates[peer])]
        report(f"{name}_tokens_per_second", rates[name], "tokens per second", command, **context)
        report(f"{name}_vs_transformers", ratios, "ratio of tokens per second", command,
               peer="in float32", **context)


def small() -> None:
    shape = dict(vocab_size=256, max_len=512, n_layers=4, d_model=128, n_heads=4)
    ours, theirs = same_model(**shape)
    decoder, n = Decoder(ours), 400
    ids = torch.randint(256, (1, PROMPT))
    runs = {"small": lambda: generate(decoder, ids, n, temperature=0),
            "small_plain": lambda: generate(ours, ids, n, temperature=0),
            "transformers": lambda: their_generate(theirs, ids, n)}
    first, *others = [fn() for fn in runs.values()]  # warm-up
    assert all(torch.equal(first, other) for other in others)
    side_by_side(n, 15, runs, tokens=n, **shape)


def gpt2(device: str) -> None:
    config = GPTConfig.preset("gpt2")
    shape = {name: getattr(config, name) for name in ("vocab_size", "max_len", "n_layers", "d_model",
                                                      "n_heads")}
    ours, theirs = (model.to(device) for model in same_model(**shape))
    decoder, half = Decoder(ours), Decoder(ours, torch.float16)
    key, n = ("gpt2", 32) if device == "cpu" else ("gpu", 256)
    command = COMMAND if device == "cpu" else f"{COMMAND} --device {device}"
    ids = torch.randint(config.vocab_size, (1, PROMPT), device=device)
    runs = {key: lambda: generate(decoder, ids, n, temperature=0),
            f"{key}_half": lambda: generate(half, ids, n, temperature=0),
            f"{key}_plain": lambda: generate(ours, ids, n, temperature=0),
            "transformers": lambda: their_generate(theirs, ids, n)}
    texts = {name: fn() for name, fn in runs.items()}  # warm-up
    if device == "cpu":
        assert torch.equal(texts[key], texts["transformers"])
    same = (texts[f"{key}_half"] == texts[key])[0, PROMPT:].int().cumprod(0).sum().item()
    report(f"{key}_half_same", [same], "tokens", command, tokens=n, about="before the first that differs")
    side_by_side(n, 9, runs, command, tokens=n, **shape)


def reading() -> None:
    """Milliseconds to multiply one row with all matrices of GPT-2's blocks."""
    D = 768
    shapes = [(3 * D, D), (D, D), (4 * D, D), (D, 4 * D)] * 12
    weights = [torch.randn(shape) for shape in shapes]
    rows = {width: torch.randn(1, width) for width in (D, 4 * D)}

    def product(dtype: torch.dtype, in_out: bool) -> Callable:
        matrices = [w.to(dtype) for w in weights]
        if in_out:
            matrices = [w.T.contiguous().T for w in matrices]
        x = {width: row.to(dtype) for width, row in rows.items()}
        return lambda: [F.linear(x[w.shape[1]], w) for w in matrices]

    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    ways = {f"{name}_{'in_out' if in_out else 'out_in'}":
            (product(dtype, in_out), dtype.itemsize, f"{name}, {'(in, out)' if in_out else '(out, in)'}")
            for dtype, name in names.items() for in_out in (False, True)}
    ways["sum"] = (lambda: [w.sum() for w in weights], 4, "float32, sum of all")
    times = {key: [] for key in ways}
    with torch.inference_mode():
        for _ in range(16):
            for key, (fn, _, _) in ways.items():
                times[key].append(seconds(fn))
    n_numbers = sum(w.numel() for w in weights)
    for key, (_, size, label) in ways.items():
        measured = [1e3 * t for t in times[key][1:]]  # the first is the warm-up
        report(f"read_{key}", measured, "ms", label=label, megabytes=size * n_numbers / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    torch.set_num_threads(2)
    if device == "cpu":
        small()
        reading()
    gpt2(device)


if __name__ == "__main__":
    main()
