"""GPT beside transformers and nanoGPT's structure, in numbers and in time, and its rung on the ladder.

Parity: the largest difference between logits, for random models of four families, both ways.
Speed: one training step (forward, loss, backward, AdamW) in turns, on two threads: ours with chapter
7's AdamW and with torch's, GPT2LMHeadModel, and a model of nanoGPT's structure written here, both
with torch's AdamW. All four have the same weights and the same batch, and must show the same losses
(nanoGPT's GELU is the exact one, which moves them by a thousandth).
Ceiling: what the ratio to transformers would be if our step were nothing but matrix products and
attention, in the kernels that both call. Rung: 0.8 M parameters on the bytes of python_docs, for as
many steps as two free cores take in about 40 seconds; the recipe was chosen on the validation part.

    python benchmarks/gpt.py [parity speed rung]
"""
import math
import os

os.environ.setdefault("OMP_PROC_BIND", "true")  # each thread on a core of its own

import sys
import tempfile
import time
from collections.abc import Callable

import common
import numpy as np
import torch
from torch import nn
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

from llm_book.gpt import GPT, GPTConfig
from llm_book.lab import record
from llm_book.optim import AdamW
from llm_book.text import load_corpus, split_text
from llm_book.train import TrainConfig, train

BENCH, SEEDS = common.Bench("gpt", range(9)), (0, 1, 2)
V, T, D, H, L = 211, 48, 64, 4, 3  # of the models that are compared in logits
SPEED = {"4x128x64": dict(L=4, D=128, H=4, T=64, B=12, steps=15),  # nanoGPT's sizes for Shakespeare
         "6x384x256": dict(L=6, D=384, H=6, T=256, B=4, steps=3)}  # on a CPU, and on a GPU
SHAPE = dict(vocab_size=256, max_len=64, n_layers=4, d_model=128, n_heads=4, d_ff=344, qk_norm=True,
             positions="rotary", norm="layer", feed_forward="swiglu", bias="none")
CONFIG = dict(max_steps=800, batch_size=8, seq_len=64, warmup_steps=24, schedule="linear", min_lr=0.0,
              optimizer="muon", max_lr=6e-3, muon_lr=0.02, betas=(0.9, 0.99), weight_decay=0.0,
              eval_every=800, eval_windows=1)
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
        BENCH.report(f"parity_{name}", worst, "difference of logits",
                     largest_logit=expected.abs().max().item(),
                     shape=f"{L} layers, width {D}, {T} positions, float32")


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


class PlainBlock(nn.Module):
    """One layer as nanoGPT builds it: one projection for queries, keys and values together."""

    def __init__(self, D: int, H: int):
        super().__init__()
        self.H, self.norm_1, self.norm_2 = H, nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.gelu, self.dropout = nn.GELU(), nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm_1(x)).split(D, dim=2)
        q, k, v = (part.view(B, T, self.H, D // self.H).transpose(1, 2) for part in (q, k, v))
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(heads.transpose(1, 2).contiguous().view(B, T, D)))
        return x + self.dropout(self.down(self.gelu(self.up(self.norm_2(x)))))


class PlainGPT(nn.Module):
    """A GPT-2 of nanoGPT's structure, with the weights of ours."""

    def __init__(self, model: GPT):
        super().__init__()
        c = model.config
        self.tokens, self.positions = nn.Embedding(c.vocab_size, c.d_model), nn.Embedding(c.max_len, c.d_model)
        self.blocks = nn.ModuleList(PlainBlock(c.d_model, c.n_heads) for _ in model.blocks)
        self.norm, self.head = nn.LayerNorm(c.d_model), nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.dropout, self.head.weight = nn.Dropout(0.0), self.tokens.weight
        self.copy(model)

    @torch.no_grad()
    def copy(self, model: GPT) -> None:
        pairs = [(self.tokens, model.embedding), (self.positions, model.positions), (self.norm, model.norm)]
        for block, ours in zip(self.blocks, model.blocks):
            parts = ours.attention.q_proj, ours.attention.k_proj, ours.attention.v_proj
            block.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            block.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
            pairs += [(block.out, ours.attention.o_proj), (block.norm_1, ours.attention_norm),
                      (block.norm_2, ours.feed_forward_norm), (block.up, ours.feed_forward.up),
                      (block.down, ours.feed_forward.down)]
        for theirs, part in pairs:
            theirs.load_state_dict(part.state_dict())

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def rivals(L: int, D: int, H: int, T: int, B: int) -> dict[str, Callable]:
    """Training steps that do the same."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=65, n_positions=T, n_embd=D, n_layer=L, n_head=H,
                                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, own = GPT.from_pretrained(folder), GPT.from_pretrained(folder)
    plain, rows = PlainGPT(ours), torch.randint(65, (B, T + 1))
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    steps = {"own": training_step(own, AdamW, lambda model: model(x, y)[1]),
             "ours": training_step(ours, torch.optim.AdamW, lambda model: model(x, y)[1]),
             "plain": training_step(plain, torch.optim.AdamW, lambda model: model(x, y)),
             "transformers": training_step(theirs, torch.optim.AdamW, lambda model: model(
                 x, labels=y, shift_labels=y, use_cache=False).loss)}
    losses = [[step() for _ in range(3)] for step in steps.values()]
    np.testing.assert_allclose(losses, losses[:1] * 4, rtol=2e-3)
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
        steps, tokens = rivals(**sizes), options["B"] * options["T"]
        times = common.in_turns(steps, BENCH.runs, rounds=options["steps"])  # some step always meets
        context = dict(threads=torch.get_num_threads(), **options)           # something else
        BENCH.report(f"tokens_per_second_{name}", tokens / times["own"], "tokens per second",
                     optimizer="llm_book.optim.AdamW", **context)
        for key, who, peer in (
                ("speed_vs_nanogpt", "own", "plain"), ("speed_model_vs_nanogpt", "ours", "plain"),
                ("speed_own_optimizer", "own", "transformers"),
                ("speed_vs_transformers", "ours", "transformers")):
            BENCH.report(f"{key}_{name}", times[peer] / times[who], "ratio of tokens per second",
                         optimizer="llm_book.optim.AdamW" if who == "own" else "torch.optim.AdamW",
                         peer="a model of nanoGPT's structure, torch.optim.AdamW" if peer == "plain"
                         else "GPT2LMHeadModel, torch.optim.AdamW", **context)
        part = shared_part(steps["ours"], options["steps"])
        BENCH.report(f"speed_ceiling_{name}", times["transformers"] / times["ours"] / part,
                     "ratio of tokens per second", shared_part=part, **context)


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
    model, start = GPT(GPTConfig(**SHAPE)), time.perf_counter()
    train(model, ids, ids[:CONFIG["seq_len"] + 1], TrainConfig(**CONFIG, seed=seed))
    return model, time.perf_counter() - start


def rung() -> None:
    tokens, validation, test = (np.frombuffer(part.encode(), np.uint8)
                                for part in split_text(load_corpus("python_docs").text))
    runs = [trained(tokens, seed) for seed in SEEDS]
    steps, read = CONFIG["max_steps"], CONFIG["batch_size"] * CONFIG["seq_len"]
    entry = record(
        "ladder/gpt", [bits(model, test) for model, _ in runs], "bits per byte", seeds=SEEDS,
        command=BENCH.command, label="GPT, 0.8 M, 40 s", corpus="python_docs", split="test part of split_text",
        test_bytes=len(test), rule=RULE, validation=float(np.mean([bits(m, validation) for m, _ in runs])),
        parameters=sum(p.numel() for p in runs[0][0].parameters()), shape=SHAPE, config=CONFIG,
        recipe=f"{steps:,} steps of Muon and AdamW on {CONFIG['batch_size']} × {CONFIG['seq_len']} bytes",
        train_bytes=len(tokens), bytes_read=steps * read,
        seconds=float(np.mean([s for _, s in runs])), threads=torch.get_num_threads())
    print(f"rung: {entry['value']:.4f} ± {entry['sd']:.4f}, validation {entry['context']['validation']:.4f}, "
          f"{entry['context']['seconds']:.0f} s", flush=True)


def main() -> None:
    torch.set_num_threads(min(2, os.cpu_count()))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parts = {"parity": parity, "speed": speed, "rung": rung}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
