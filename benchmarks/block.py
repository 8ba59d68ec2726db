"""A block beside torch's, norms by hand beside the kernels, and what a warm-up is worth to each wiring.

Times are of forward and backward in training mode, float32, on one core; each pair in turn in one run.
The warm-up runs train the byte model of chapter 12, eight blocks of width 32, on Python's documentation.

    python benchmarks/block.py
"""
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import common
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llm_book.attention import MultiHeadAttention
from llm_book.block import Block, FeedForward, LayerNorm, layer_norm, rms_norm
from llm_book.data import get_batch
from llm_book.loss import cross_entropy
from llm_book.text import load_corpus, split_text

BENCH, STEPS = common.Bench("block", range(9)), 10
B, T, D, H = 8, 128, 256, 4  # for the timing
SEEDS, N_STEPS, N_LAYERS, WIDTH = range(3), 800, 8, 32  # for the warm-up
SETTINGS = [*product(("post-norm", "pre-norm"), ((3e-3, 0), (3e-3, 300), (1e-3, 0)))]  # lr, warm-up


def our_block() -> Block:
    return Block(MultiHeadAttention(D, H, bias=True), FeedForward(D, 4 * D), lambda: LayerNorm(D))


def torch_block() -> nn.Module:
    return nn.TransformerEncoderLayer(D, H, 4 * D, dropout=0.0, activation="gelu", batch_first=True,
                                      norm_first=True)


def step_of(fn: Callable, parameters: list) -> Callable[[], None]:
    """Forward and backward, with gradients for the parameters and the input."""
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    message = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))

    def step() -> None:
        for leaf in (x, *parameters):
            leaf.grad = None
        fn(x).backward(message)

    return step


def compare(name: str, ours: Callable, theirs: Callable, n: int, **context) -> None:
    """Record the ratio of times, ours to theirs."""
    times = common.in_turns({"ours": ours, "theirs": theirs}, BENCH.runs, repeat=n)
    BENCH.report(name, times["ours"] / times["theirs"], "ratio of times", cores=1, shape=[B, T, D],
                 steps=n, **{f"{who}_ms": 1e3 * float(np.median(t)) for who, t in times.items()},
                 **context)


def speed() -> None:
    ours, theirs = our_block(), torch_block()
    compare("block_vs_torch", step_of(ours, list(ours.parameters())),
            step_of(theirs, list(theirs.parameters())), STEPS,
            peer="nn.TransformerEncoderLayer(norm_first=True), no mask, no dropout")
    weight, bias = (torch.randn(D).requires_grad_() for _ in range(2))
    compare("layer_norm_vs_kernel", step_of(lambda x: layer_norm(x, weight, bias), [weight, bias]),
            step_of(lambda x: F.layer_norm(x, (D,), weight, bias), [weight, bias]), 100)
    compare("rms_norm_vs_kernel", step_of(lambda x: rms_norm(x, weight), [weight]),
            step_of(lambda x: F.rms_norm(x, (D,), weight, eps=1e-6), [weight]), 100)


def byte_model(wiring: str, seed: int) -> nn.ModuleDict:
    """As on the page, for the two wirings with a stream and norms."""
    pre_norm, norm = wiring == "pre-norm", lambda: LayerNorm(WIDTH)
    model = nn.ModuleDict({
        "embedding": nn.Embedding(256, WIDTH), "head": nn.Linear(WIDTH, 256),
        "blocks": nn.ModuleList(Block(MultiHeadAttention(WIDTH, 2), FeedForward(WIDTH, 4 * WIDTH),
                                      norm, pre_norm=pre_norm) for _ in range(N_LAYERS)),
        "norm": norm() if pre_norm else nn.Identity()})
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    nn.init.normal_(model["embedding"].weight, generator=generator)
    nn.init.normal_(model["head"].weight, std=0.02, generator=generator)
    return model


def final_bits(job: tuple) -> float:
    """Validation bits per byte after training."""
    (wiring, (lr, warmup)), seed = job
    torch.set_num_threads(1)
    train, validation, _ = (np.frombuffer(part.encode(), np.uint8)
                            for part in split_text(load_corpus("python_docs").text))
    model = byte_model(wiring, seed)

    def loss(x, y):
        h = model["embedding"](x)
        for block in model["blocks"]:
            h = block(h, causal=True)
        return cross_entropy(model["head"](model["norm"](h)), y)

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    dice = torch.Generator().manual_seed(seed)
    for step in range(N_STEPS):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / (warmup + 1))
        optimizer.zero_grad()
        loss(*get_batch(train, 16, 32, "cpu", dice)).backward()
        optimizer.step()
    with torch.no_grad():
        held_out = get_batch(validation, 512, 32, "cpu", torch.Generator().manual_seed(9))
        return loss(*held_out).item() / math.log(2)


def warmup() -> None:
    jobs = [*product(SETTINGS, SEEDS)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        bits = dict(zip(jobs, pool.map(final_bits, jobs)))
    for setting in SETTINGS:
        wiring, (lr, steps) = setting
        BENCH.report(f"{wiring}_lr{lr}_warmup{steps}", [bits[setting, seed] for seed in SEEDS],
                     "bits per byte", SEEDS, steps=N_STEPS, n_layers=N_LAYERS, d_model=WIDTH,
                     batch=[16, 32], optimizer="AdamW")


def main() -> None:
    torch.set_num_threads(1)
    speed()
    warmup()


if __name__ == "__main__":
    main()
