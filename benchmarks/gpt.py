"""GPT beside transformers, in numbers and in time, and its rung on the ladder, on two threads.

Parity: the largest difference between logits, for random models of four families, both ways.
Speed: one training step of the same shape as GPT2LMHeadModel, with the same weights and batch, in
turns; with torch's AdamW on both sides, and with chapter 7's on ours. Ceiling: what that ratio would
be if our step were nothing but matrix products and attention, in the kernels that both call. Rung:
0.8 M parameters on the bytes of python_docs, for as many steps as two free cores take in about 40
seconds; the recipe was chosen on the validation part.

    python benchmarks/gpt.py
"""
import math
import os

os.environ.setdefault("OMP_PROC_BIND", "true")  # each thread on a core of its own

import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from llm_book.data import get_batch
from llm_book.gpt import GPT, GPTConfig
from llm_book.lab import progress, record
from llm_book.optim import AdamW, Muon, clip_grad_norm, linear_schedule
from llm_book.text import load_corpus, split_text

COMMAND, ROUNDS, SEEDS = "python benchmarks/gpt.py", range(9), (0, 1, 2)
V, T, D, H, L = 211, 48, 64, 4, 3  # of the models that are compared in logits
SPEED = {"4x128x64": dict(L=4, D=128, H=4, T=64, B=12, steps=15),  # nanoGPT's sizes for Shakespeare
         "6x384x256": dict(L=6, D=384, H=6, T=256, B=4, steps=3)}  # on a CPU, and on a GPU
SHAPE = dict(vocab_size=256, max_len=64, n_layers=4, d_model=128, n_heads=4, d_ff=344, qk_norm=True,
             positions="rotary", norm="layer", feed_forward="swiglu", bias="none")
BATCH, STEPS, WARMUP, LR, MUON_LR = 8, 800, 24, 6e-3, 0.02
SHARED = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product")  # kernels of both
RULE = ("every byte of the text is predicted once, from at least 33 and at most 64 bytes before it "
        "where there are as many; the first, which has none, is charged 8 bits")


def families() -> dict[str, torch.nn.Module]:
    rotary = dict(vocab_size=V, max_position_embeddings=T, hidden_size=D, num_hidden_layers=L,
                  num_attention_heads=H, num_key_value_heads=2, intermediate_size=176)
    return {"gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=T, n_embd=D, n_layer=L, n_head=H)),
            "llama": LlamaForCausalLM(LlamaConfig(**rotary)),
            "qwen2": Qwen2ForCausalLM(Qwen2Config(**rotary)),
            "qwen3": Qwen3ForCausalLM(Qwen3Config(**rotary, head_dim=24))}


@torch.no_grad()
def parity() -> None:
    torch.manual_seed(0)
    ids = torch.randint(V, (8, T))
    for name, theirs in families().items():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        with tempfile.TemporaryDirectory() as folder:
            theirs.eval().save_pretrained(folder)
            ours = GPT.from_pretrained(folder)
            ours.save_pretrained(f"{folder}/back")
            back = type(theirs).from_pretrained(f"{folder}/back").eval()
        expected = theirs(ids).logits
        worst = max((logits - expected).abs().max().item() for logits in (ours(ids)[0], back(ids).logits))
        record(f"gpt/parity_{name}", worst, "difference of logits", seeds=(), command=COMMAND,
               largest_logit=expected.abs().max().item(), shape=f"{L} layers, width {D}, {T} places, float32")
        print(f"parity {name}: {worst:.1e}", flush=True)


def training_step(model: torch.nn.Module, optimizer_class: type, loss_of: Callable) -> Callable[[], float]:
    optimizer = optimizer_class(model.parameters(), lr=1e-3, weight_decay=0.1)
    model.train()

    def step() -> float:
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def seconds(work: Callable) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rivals(L: int, D: int, H: int, T: int, B: int) -> tuple[Callable, Callable, Callable]:
    """Training steps that do the same: ours, ours with chapter 7's AdamW, and theirs."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=65, n_positions=T, n_embd=D, n_layer=L, n_head=H,
                                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, own = GPT.from_pretrained(folder), GPT.from_pretrained(folder)
    rows = torch.randint(65, (B, T + 1))
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    steps = (training_step(ours, torch.optim.AdamW, lambda model: model(x, y)[1]),
             training_step(own, AdamW, lambda model: model(x, y)[1]),
             training_step(theirs, torch.optim.AdamW, lambda model: model(
                 x, labels=y, shift_labels=y, use_cache=False).loss))
    losses = [[step() for _ in range(3)] for step in steps]
    np.testing.assert_allclose(losses, losses[:1] * 3, rtol=1e-4)
    return steps


def shared_part(step: Callable, runs: int) -> float:
    """Which part of a step's time goes into kernels that the other model calls as well."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            step()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return sum(time for key, time in times.items() if key.startswith(SHARED)) / sum(times.values())


def speed() -> None:
    for name, options in SPEED.items():
        sizes = {key: value for key, value in options.items() if key != "steps"}
        steps, times = rivals(**sizes), []
        for _ in ROUNDS:
            turns = [[seconds(step) for step in steps] for _ in range(options["steps"])]
            times.append(np.median(turns, axis=0))  # some step always meets something else
        times, tokens = np.array(times), options["B"] * options["T"]
        context = dict(command=COMMAND, seeds=list(ROUNDS), threads=torch.get_num_threads(), **options,
                       peer="GPT2LMHeadModel with torch.optim.AdamW")
        record(f"gpt/tokens_per_second_{name}", tokens / times[:, 0], "tokens per second",
               optimizer="torch.optim.AdamW", **context)
        for column, key, optimizer in ((0, "speed_vs_transformers", "torch.optim.AdamW"),
                                       (1, "speed_own_optimizer", "llm_book.optim.AdamW")):
            entry = record(f"gpt/{key}_{name}", times[:, 2] / times[:, column],
                           "ratio of tokens per second", optimizer=optimizer, **context)
            print(f"{key} {name}: {entry['value']:.3f} ± {entry['sd']:.3f}", flush=True)
        part = shared_part(steps[0], options["steps"])
        entry = record(f"gpt/speed_ceiling_{name}", times[:, 2] / times[:, 0] / part,
                       "ratio of tokens per second", shared_part=part, **context)
        print(f"ceiling {name}: {entry['value']:.3f} ± {entry['sd']:.3f}, shared {part:.3f}", flush=True)


@torch.no_grad()
def bits(model: GPT, ids: np.ndarray) -> float:
    """Bits per byte by `RULE`: windows that overlap by half, of which the second half counts."""
    window, half = model.config.max_len, model.config.max_len // 2
    model.eval()
    rows = np.lib.stride_tricks.sliding_window_view(ids, window + 1)[::half]
    nats, priced = 8 * math.log(2), 1  # the first byte
    for chunk in np.array_split(rows, math.ceil(len(rows) / 64)):
        chunk = torch.from_numpy(chunk.astype(np.int64))
        logits, _ = model(chunk[:, :-1])
        losses = functional.cross_entropy(logits.mT, chunk[:, 1:], reduction="none")
        if priced == 1:  # the first window has nothing before it and counts as a whole
            nats, priced = nats + losses[0, :half].sum().item(), priced + half
        nats, priced = nats + losses[:, half:].sum().item(), priced + losses[:, half:].numel()
    rest = len(ids) - priced
    if rest:
        last = torch.from_numpy(ids[-window - 1:].astype(np.int64))[None]
        logits, _ = model(last[:, :-1])
        nats += functional.cross_entropy(logits[0, -rest:], last[0, -rest:], reduction="sum").item()
    return nats / math.log(2) / len(ids)


def trained(ids: np.ndarray, seed: int) -> tuple[GPT, float]:
    """A model and the seconds that its training took."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, start = GPT(GPTConfig(**SHAPE)), time.perf_counter()
    inner, rest = [], []
    for name, parameter in model.named_parameters():
        (inner if "blocks" in name and parameter.ndim == 2 else rest).append(parameter)
    optimizers = Muon(inner, MUON_LR), AdamW(rest, LR, betas=(0.9, 0.99), weight_decay=0.0)
    for step in progress(range(STEPS), f"seed {seed}"):
        for optimizer, lr in zip(optimizers, (MUON_LR, LR)):
            for group in optimizer.param_groups:
                group["lr"] = linear_schedule(step, lr, 0.0, WARMUP, STEPS)
        _, loss = model(*get_batch(ids, BATCH, SHAPE["max_len"], "cpu", generator))
        model.zero_grad()
        loss.backward()
        clip_grad_norm(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    return model, time.perf_counter() - start


def rung() -> None:
    train, validation, test = (np.frombuffer(part.encode(), np.uint8)
                               for part in split_text(load_corpus("python_docs").text))
    runs = [trained(train, seed) for seed in SEEDS]
    entry = record(
        "ladder/gpt", [bits(model, test) for model, _ in runs], "bits per byte", seeds=SEEDS,
        command=COMMAND, label="GPT, 0.8 M, 40 s", corpus="python_docs", split="test part of split_text",
        test_bytes=len(test), rule=RULE, validation=float(np.mean([bits(m, validation) for m, _ in runs])),
        parameters=sum(p.numel() for p in runs[0][0].parameters()), shape=SHAPE,
        recipe=f"{STEPS:,} steps of Muon and AdamW on {BATCH} × {SHAPE['max_len']} bytes",
        train_bytes=len(train), bytes_read=STEPS * BATCH * SHAPE["max_len"],
        lr=LR, muon_lr=MUON_LR, seconds=float(np.mean([s for _, s in runs])), threads=torch.get_num_threads())
    print(f"rung: {entry['value']:.4f} ± {entry['sd']:.4f}, validation {entry['context']['validation']:.4f}, "
          f"{entry['context']['seconds']:.0f} s", flush=True)


def main() -> None:
    torch.set_num_threads(min(2, os.cpu_count()))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parity()
    speed()
    rung()


if __name__ == "__main__":
    main()
