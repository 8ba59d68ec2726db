"""Two ceilings, memory predicted and measured, the speed ladder, and GPT-2 in turns with
transformers and a plain torch loop: what chapter 16 quotes from a CPU, where the models are small.

`benchmarks/on_gpu.py` measures the same on a GPU, in GPT-2's size, and more.

    python benchmarks/gpu.py                # 5 minutes
"""
import argparse
import functools
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # compile times that are true

import common
import numpy as np
import torch
from speed_ladder import (
    RUNGS,
    SIZES,
    START,
    climb,
    docs,
    ladder_table,
    record_ladder,
    speed_ladder,
    unavailable,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from llm_book.gpt import GPT, GPTConfig
from llm_book.gpu import (
    matmul_peak,
    memory_bandwidth,
    memory_estimate,
    mfu,
    synchronise,
    train_flops_per_token,
)
from llm_book.train import TrainConfig, accumulate, compiled

ROUNDS = range(7)


class Bench:
    """The device, the sizes that suit it, and where the records and logs go."""

    def __init__(self, device: str, out: str | Path, command: str, tiny: bool = False):
        self.device, self.tiny, self.command = torch.device(device), tiny, command
        self.cuda = self.device.type == "cuda"
        self.name = "tiny" if tiny else self.device.type  # how keys of the ledger begin
        self.precision = "bfloat16" if self.cuda else "float32"
        self.rounds = ROUNDS[:2] if tiny else ROUNDS
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.peaks: dict[str, float] = {}
        self.ledger = common.Bench("gpu", command=command, threads=torch.get_num_threads())

    def record(self, key: str, value, unit: str, **context) -> None:
        seeds = range(np.size(value)) if np.size(value) > 1 else ()
        self.ledger.report(f"{self.name}_{key}", value, unit, seeds, **context)

    # ---- ceilings

    def ceilings(self) -> None:
        size = 256 if self.tiny else None
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        for name, dtype in kinds.items():
            rates = [matmul_peak(self.device, dtype, size) for _ in self.rounds]
            self.peaks[name] = max(rates)
            self.record(f"peak_{name}", np.array(rates) / 1e12, "TFLOP/s", best=max(rates) / 1e12)
        if self.cuda:
            torch.set_float32_matmul_precision("high")
            rates = [matmul_peak(self.device, torch.float32, size) for _ in self.rounds]
            torch.set_float32_matmul_precision("highest")
            self.record("peak_tf32", np.array(rates) / 1e12, "TFLOP/s", best=max(rates) / 1e12)

    def peak(self) -> float:
        """FLOPs per second of the fastest matrix product that was seen."""
        if not self.peaks:
            self.peaks = {str(dtype): matmul_peak(self.device, dtype, 256 if self.tiny else None)
                          for dtype in (torch.float32, torch.bfloat16)}
        return max(self.peaks.values())

    def bandwidth(self) -> None:
        n_bytes = 2**20 if self.tiny else None
        rates = [memory_bandwidth(self.device, n_bytes) / 1e9 for _ in self.rounds]
        self.record("bandwidth", rates, "GB/s", best=max(rates))

    # ---- memory

    def memory(self) -> None:
        config, batch_size, passes = self.sizes()
        train_tokens, val_tokens, _ = docs()
        plan = TrainConfig(3, batch_size=batch_size, accumulation_steps=2, seq_len=config.max_len,
                           warmup_steps=1, eval_windows=4)
        cases = {"float32, plain": dict(fused_attention=False), "float32": {},
                 "bfloat16": dict(precision="bfloat16"),
                 "bfloat16, checkpointed": dict(precision="bfloat16", checkpointing=True)}
        measured, predicted = {}, {}
        for name, case in cases.items():
            settings = {**START, "fused_attention": True, "fused_optimizer": True, **case}
            measured[name] = climb(config, train_tokens, val_tokens, plan, self.device,
                                    settings)["peak_bytes"]
            predicted[name] = sum(memory_estimate(config, batch_size, plan.seq_len, **case).values())
            print(f"memory, {name}: {measured[name] / 1e6:,.1f} MB, "
                  f"predicted {predicted[name] / 1e6:,.1f}", flush=True)
        self.record("memory_ratio", [measured[name] / predicted[name] for name in cases],
                    "measured / predicted", cases=list(cases), measured=list(measured.values()),
                    predicted=list(predicted.values()), model=asdict(config), batch_size=batch_size)

    def sizes(self) -> tuple[GPTConfig, int, int]:
        """Model, windows in a pass, passes in an update."""
        if self.tiny:
            return GPTConfig(256, max_len=32, n_layers=1, d_model=32, n_heads=2), 2, 2
        return SIZES["gpt2" if self.cuda else "small"]

    def compiles(self) -> bool:
        """On a CPU it is not worth its time, but a tiny run tries it."""
        return (self.cuda or self.tiny) and not unavailable({"compiled": True}, self.device)

    # ---- the ladder

    def ladder(self, seconds_left: Callable[[], float] = lambda: math.inf) -> None:
        """Each rung is recorded as soon as it is measured; no rung is begun when time is out."""
        config, batch_size, passes = self.sizes()
        steps, preset = (5 if self.tiny else 20 if self.cuda else 30), "gpt2" if self.cuda else "small"
        train_tokens, val_tokens, _ = docs()
        plan = TrainConfig(steps, batch_size=batch_size, accumulation_steps=passes,
                           seq_len=config.max_len, warmup_steps=steps // 8,
                           eval_windows=4 if self.tiny else 64)
        rungs = [rung for rung in RUNGS if "compiled" not in rung[1] or self.compiles() or not self.cuda]
        rows = []
        for row in speed_ladder(config, train_tokens, val_tokens, plan, device=self.device, rungs=rungs,
                                twins=2 if self.tiny else 4, peak_flops=self.peak()):
            rows.append(row)
            record_ladder([row], self.name, preset, self.command, steps=steps,
                          windows=[batch_size, passes, config.max_len],
                          threads=torch.get_num_threads(), peak_tflops=self.peak() / 1e12)
            print(ladder_table([row]).splitlines()[1], flush=True)
            if seconds_left() < 0:
                break
        print(ladder_table(rows), flush=True)
        (self.out / f"ladder_{self.name}.json").write_text(json.dumps(rows, indent=1))

    # ---- the race

    def race(self, with_compile: bool = False) -> None:
        """Updates in turns: ours, transformers' and plain torch's; or both of the first compiled."""
        config, batch_size, _ = self.sizes()
        batch_size = 32 if self.cuda else batch_size
        steps = self.contenders(config, batch_size, with_compile)
        calls = {name: functools.partial(self.whole, step) for name, step in steps.items()}
        times = common.in_turns(calls, self.rounds, rounds=2 if self.tiny or self.cuda else 5)
        tokens, after = batch_size * config.max_len, "_compiled" if with_compile else ""
        (self.out / f"race{after}_{self.name}.json").write_text(
            json.dumps({name: (tokens / seconds).tolist() for name, seconds in times.items()}, indent=1))
        for name, seconds in times.items():
            print(f"{name:24} {np.median(tokens / seconds):12,.0f} tokens/s", flush=True)
        self.record_race(times, tokens, config, batch_size, after)

    def whole(self, step: Callable[[], float]) -> None:
        """A step, waited for."""
        step()
        synchronise(self.device)

    def record_race(self, times: dict, tokens: int, config: GPTConfig, batch_size: int, after: str) -> None:
        ours, how = times["ours"], "torch.compile" if after else "not compiled"
        context = dict(model=asdict(config), batch_size=batch_size, precision=self.precision)
        shares = {causal: [mfu(tokens / t, train_flops_per_token(config, config.max_len, causal), self.peak())
                           for t in ours] for causal in (False, True)}
        self.record(f"mfu{after}", shares[False], "share of the measured matmul peak",
                    tokens_per_second=float(np.median(tokens / ours)), peak_tflops=self.peak() / 1e12,
                    causal_count=float(np.mean(shares[True])), **context)
        self.record(f"vs_transformers{after}", times["transformers"] / ours, "ratio of tokens per second",
                    peer=f"GPT2LMHeadModel, sdpa, fused AdamW, {how}", **context)
        if "plain torch" in times:
            self.record("vs_plain", times["plain torch"] / ours, "ratio of tokens per second",
                        peer="nn.TransformerEncoder, torch.optim.AdamW as it comes", **context)

    def contenders(self, config: GPTConfig, batch_size: int, with_compile: bool) -> dict:
        """Updates that do the same: one pass over the same batch, forward, backward, AdamW."""
        torch.manual_seed(0)
        rows = torch.randint(256, (batch_size, config.max_len + 1), device=self.device)
        batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        torch.set_float32_matmul_precision("high" if self.cuda else "highest")
        theirs = GPT2LMHeadModel(GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.max_len, n_embd=config.d_model,
            n_layer=config.n_layers, n_head=config.n_heads, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa"))
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            models = {"ours": GPT.from_pretrained(folder), "transformers": Wrapped(theirs)}
        models |= {} if with_compile else {"plain torch": Plain(config)}
        steps = {name: self.step_of(name, model.to(self.device).train(), batch, with_compile)
                 for name, model in models.items()}
        losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
        print("first losses", losses, flush=True)
        same = [losses[name] for name in losses if name != "plain torch"]
        np.testing.assert_allclose(same, same[:1] * len(same), rtol=1e-2 if self.cuda else 1e-4)
        return steps

    def step_of(self, name: str, model: nn.Module, batch: tuple, with_compile: bool) -> Callable[[], float]:
        fused = name != "plain torch"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1,
                                      **({"fused": True} if fused else {}))
        called = compiled(model) if with_compile else model

        def step() -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = accumulate(called, [batch], self.precision)
            optimizer.step()
            return loss

        return step


class Wrapped(nn.Module):
    """transformers' model, called as ours."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> tuple:
        return None, self.model(ids, labels=targets, shift_labels=targets, use_cache=False).loss


class Plain(nn.Module):
    """GPT-2's shape from torch's own layers, as a tutorial would write it."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.tokens, self.places = nn.Embedding(c.vocab_size, c.d_model), nn.Embedding(c.max_len, c.d_model)
        layer = nn.TransformerEncoderLayer(c.d_model, c.n_heads, c.d_ff, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, c.n_layers, nn.LayerNorm(c.d_model),
                                            enable_nested_tensor=False)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> tuple:
        T = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(T, device=ids.device)
        x = self.tokens(ids) + self.places(torch.arange(T, device=ids.device))
        logits = self.head(self.blocks(x, mask=mask, is_causal=True))
        return None, nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", default="build/gpu", help="folder for logs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench("cpu", options.out, "python benchmarks/gpu.py")
    for section in (bench.ceilings, bench.bandwidth, bench.memory, bench.ladder, bench.race):
        print(f"== {section.__name__}", flush=True)
        section()


if __name__ == "__main__":
    main()
