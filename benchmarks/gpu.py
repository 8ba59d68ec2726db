"""Everything that chapter 16 quotes, on the device that is there: two ceilings, memory predicted and
measured, the speed ladder, GPT-2 in turns with transformers and a plain torch loop, Shakespeare.

On a CPU the models are small; the shape of GPT-2 124M, and Shakespeare with 6 layers of width 384,
need a GPU. Logs go into --out.

    python benchmarks/gpu.py                      # CPU: 5 minutes; GPU: 10
    python benchmarks/gpu.py --data FILE          # and Shakespeare, on a GPU
    python benchmarks/gpu.py --data FILE --tiny   # every branch in tiny sizes; records nothing
"""
import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # compile times that are true

import common
import gpt as chapter14  # benchmarks/gpt.py, for its yardstick
import numpy as np
import torch
from speed_ladder import (
    RUNGS,
    SIZES,
    START,
    Compiled,
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
from llm_book.lab import best_device
from llm_book.tokens import CharTokenizer
from llm_book.train import TrainConfig, accumulate, train

COMMAND, ROUNDS = "python benchmarks/gpu.py", range(7)
TARGET = 1.4697  # nats: the best validation loss of the well-known recipe, as its author tells it

# Shakespeare by characters. The recipe is nanoGPT's train_shakespeare_char; the shape is the same.
SHAPE = dict(max_len=256, n_layers=6, d_model=384, n_heads=6, dropout=0.2, bias="none")
MODERN = dict(positions="rotary", qk_norm=True, feed_forward="swiglu")  # and layer norm, as there
RECIPE = TrainConfig(5_000, batch_size=64, seq_len=256, max_lr=1e-3, min_lr=1e-4, warmup_steps=100,
                     betas=(0.9, 0.99), eval_every=250, eval_windows=0, checkpoint_every=5_000)
FAST = replace(RECIPE, max_steps=600, batch_size=128, optimizer="muon", muon_lr=0.02, max_lr=3e-3,
               min_lr=0.0, warmup_steps=40, schedule="linear", betas=(0.9, 0.95), eval_every=600)
BEST = replace(FAST, max_steps=1_500, eval_every=250)


class Bench:
    """The device, the sizes that suit it, and where the records and logs go."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        self.cuda, self.tiny = self.device.type == "cuda", options.tiny
        self.precision = "bfloat16" if self.cuda else "float32"
        self.rounds = ROUNDS[:2] if self.tiny else ROUNDS
        self.out = Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.peaks: dict[str, float] = {}
        self.ledger = common.Bench("gpu", command=COMMAND, threads=torch.get_num_threads())

    def record(self, key: str, value, unit: str, **context) -> None:
        seeds = range(np.size(value)) if np.size(value) > 1 else ()
        self.ledger.report(f"{self.device.type}_{key}", value, unit, seeds, **context)

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
        """On a CPU it is not worth its time, but --tiny tries it."""
        return (self.cuda or self.tiny) and not self.options.no_compile and not unavailable(
            {"compiled": True}, self.device)

    # ---- the ladder

    def ladder(self) -> None:
        config, batch_size, passes = self.sizes()
        steps, preset = (5 if self.tiny else 30), "gpt2" if self.cuda else "small"
        train_tokens, val_tokens, _ = docs()
        plan = TrainConfig(steps, batch_size=batch_size, accumulation_steps=passes,
                           seq_len=config.max_len, warmup_steps=steps // 8, eval_windows=64)
        rungs = [rung for rung in RUNGS if not (self.options.no_compile and "compiled" in rung[1])]
        rows = speed_ladder(config, train_tokens, val_tokens, plan, device=self.device, rungs=rungs,
                            twins=2 if self.tiny else 4, peak_flops=max(self.peaks.values()))
        print(ladder_table(rows), flush=True)
        (self.out / f"ladder_{self.device.type}.json").write_text(json.dumps(rows, indent=1))
        record_ladder(rows, self.device.type, preset, COMMAND, steps=steps,
                      windows=[batch_size, passes, config.max_len],
                      threads=torch.get_num_threads(), peak_tflops=max(self.peaks.values()) / 1e12)

    # ---- the race

    def race(self) -> None:
        config, batch_size, _ = self.sizes()
        if self.cuda and not self.tiny:
            batch_size = self.options.race_batch
        with_compile = self.compiles()
        steps = self.contenders(config, batch_size, with_compile)
        calls = {name: functools.partial(self.whole, step) for name, step in steps.items()}
        times = common.in_turns(calls, self.rounds, rounds=2 if self.tiny else 5)
        tokens = batch_size * config.max_len
        (self.out / f"race_{self.device.type}.json").write_text(
            json.dumps({name: (tokens / seconds).tolist() for name, seconds in times.items()}, indent=1))
        for name, seconds in times.items():
            print(f"{name:24} {np.median(tokens / seconds):12,.0f} tokens/s", flush=True)
        self.record_race(times, tokens, config, batch_size)

    def whole(self, step: Callable[[], float]) -> None:
        """A step, waited for."""
        step()
        synchronise(self.device)

    def record_race(self, times: dict, tokens: int, config: GPTConfig, batch_size: int) -> None:
        ours = times["ours, compiled" if "ours, compiled" in times else "ours"]
        context = dict(model=asdict(config), batch_size=batch_size, precision=self.precision)
        peak = max(self.peaks.values())
        shares = {causal: [mfu(tokens / t, train_flops_per_token(config, config.max_len, causal), peak)
                           for t in ours] for causal in (False, True)}
        self.record("mfu", shares[False], "share of the measured matmul peak",
                    tokens_per_second=float(np.median(tokens / ours)), peak_tflops=peak / 1e12,
                    causal_count=float(np.mean(shares[True])), **context)
        self.record("vs_transformers", times["transformers"] / ours, "ratio of tokens per second",
                    peer="GPT2LMHeadModel, sdpa, fused AdamW, not compiled", **context)
        self.record("vs_plain", times["plain torch"] / ours, "ratio of tokens per second",
                    peer="nn.TransformerEncoder, torch.optim.AdamW as it comes", **context)
        if "transformers, compiled" in times:
            self.record("vs_transformers_compiled", times["transformers, compiled"] / ours,
                        "ratio of tokens per second", peer="GPT2LMHeadModel, sdpa, fused AdamW, "
                        "torch.compile", **context)

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
            models = {"ours": GPT.from_pretrained(folder), "transformers": Wrapped(theirs),
                      "plain torch": Plain(config)}
            if with_compile:
                models |= {"ours, compiled": GPT.from_pretrained(folder), "transformers, compiled":
                           Wrapped(GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa"))}
        steps = {name: self.step_of(name, model.to(self.device).train(), batch)
                 for name, model in models.items()}
        losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
        print("first losses", losses, flush=True)
        same = [losses[name] for name in losses if name != "plain torch"]
        np.testing.assert_allclose(same, same[:1] * len(same), rtol=1e-2 if self.cuda else 1e-4)
        return steps

    def step_of(self, name: str, model: nn.Module, batch: tuple) -> Callable[[], float]:
        fused = name != "plain torch"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1,
                                      **({"fused": True} if fused else {}))
        called = Compiled(model) if "compiled" in name else model

        def step() -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = accumulate(called, [batch], self.precision)
            optimizer.step()
            return loss

        return step

    # ---- Shakespeare

    def shakespeare(self) -> None:
        path = self.options.data
        if path is None or not (self.cuda or self.tiny):
            print("Shakespeare: needs --data FILE and a GPU (or --tiny)", flush=True)
            return
        text = Path(path).read_text(encoding="utf-8")
        tokenizer = CharTokenizer(text)
        ids = np.array(tokenizer.encode(text), np.uint16)
        cut = int(0.9 * len(ids))
        tokens = (ids[:cut], ids[cut:cut + 3_000] if self.tiny else ids[cut:])
        seeds = range(1 if self.tiny else 3)
        plain, modern = {**SHAPE}, {**SHAPE, **MODERN}
        changes: dict = {}
        for key, _, value in (pair.partition("=") for pair in self.options.ours):
            where = changes if key in TrainConfig.__dataclass_fields__ else modern
            where[key] = json.loads(value) if value[:1] in "-.0123456789" else value
        runs = {"recipe": (plain, RECIPE), "fast": (modern, replace(FAST, **changes)),
                "best": (modern, BEST)}
        found = {name: [self.run(f"shakespeare_{name}_{seed}", tokens, tokenizer.vocab_size, shape,
                                 replace(plan, seed=seed)) for seed in seeds]
                 for name, (shape, plan) in runs.items()}
        self.record_shakespeare(found, runs)

    def record_shakespeare(self, found: dict, runs: dict) -> None:
        def column(name: str, key: str) -> list[float]:
            return [run[key] for run in found[name]]

        recipe = np.array(column("recipe", "seconds"))
        recipe_all = recipe + column("recipe", "compile_seconds")
        ours = np.array(column("fast", "seconds"))
        context = {name: dict(shape=shape, plan=asdict(plan), runs=found[name])
                   for name, (shape, plan) in runs.items()}
        self.record("shakespeare_recipe_loss", column("recipe", "val_loss"), "nats per character",
                    best=column("recipe", "best_val_loss"), **context["recipe"])
        self.record("shakespeare_recipe_seconds", recipe, "seconds")
        self.record("shakespeare_loss", column("fast", "val_loss"), "nats per character",
                    target=TARGET, **context["fast"])
        self.record("shakespeare_seconds", ours, "seconds")
        self.record("shakespeare_time", ours / recipe, "ratio of times, evaluations included, "
                    "compilation not", with_compilation=float(np.mean(
                        (ours + column("fast", "compile_seconds")) / recipe_all)))
        self.record("shakespeare_best", column("best", "best_val_loss"), "nats per character",
                    seconds=column("best", "seconds"), **context["best"])
        for name in found:
            for run in found[name]:
                print(f"{name}: val_loss={run['val_loss']:.4f} best={run['best_val_loss']:.4f} "
                      f"seconds={run['seconds']:.1f}", flush=True)

    def run(self, name: str, tokens: tuple, vocab_size: int, shape: dict, plan: TrainConfig) -> dict:
        """One training run with chapter 15's loop, its log in `out`."""
        if self.tiny:
            shape = {**shape, "max_len": 16, "n_layers": 1, "d_model": 16, "n_heads": 2}
            plan = replace(plan, max_steps=4, seq_len=16, batch_size=2, warmup_steps=1, eval_every=2)
        plan = replace(plan, precision=self.precision)
        torch.manual_seed(plan.seed)
        torch.set_float32_matmul_precision("high" if self.cuda else "highest")
        model = GPT(GPTConfig(vocab_size, **shape)).to(self.device)
        called, started = model, time.perf_counter()
        if self.compiles():
            torch.compiler.reset()
            called = Compiled(model)
            self.rehearse(called, tokens, plan)
        compiled = time.perf_counter() - started
        started = time.perf_counter()
        history = train(called, *tokens, plan, progress=False)  # evaluations included
        seconds = time.perf_counter() - started
        about = {"shape": shape, "plan": asdict(plan), "seconds": seconds}
        (self.out / f"{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in (about, *history)))
        losses = [entry["val_loss"] for entry in history if "val_loss" in entry]
        self.model = model
        print(f"{name}: val_loss={losses[-1]:.4f} best={min(losses):.4f} seconds={seconds:.1f}", flush=True)
        return {"val_loss": losses[-1], "best_val_loss": min(losses), "seconds": seconds,
                "compile_seconds": compiled, "steps": plan.max_steps, "val_losses": losses}

    def rehearse(self, model: nn.Module, tokens: tuple, plan: TrainConfig) -> None:
        """Compile what training needs, and put the weights back."""
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train(model, *tokens, replace(plan, max_steps=3, warmup_steps=1, eval_every=3), progress=False)
        model.load_state_dict(before)
        model.zero_grad(set_to_none=True)

    # ---- the rung of the book's ladder

    def rung(self) -> None:
        if not (self.cuda or self.tiny):
            print("the rung: needs a GPU (or --tiny)", flush=True)
            return
        train_tokens, val_tokens, test = docs()
        if self.tiny:
            val_tokens, test = val_tokens[:2_000], test[:2_000]
        shape, runs, bits = {**SHAPE, **MODERN}, [], []
        for seed in range(1 if self.tiny else 3):
            plan = replace(BEST, seed=seed)
            runs.append(self.run(f"rung_{seed}", (train_tokens, val_tokens), 256, shape, plan))
            plain = GPT(self.model.config)  # not compiled, on the CPU
            plain.load_state_dict({name: value.cpu() for name, value in self.model.state_dict().items()})
            bits.append(chapter14.bits(plain, test))
        window = plain.config.max_len
        common.Bench("ladder", command=COMMAND).report(
            "gpt_gpu", bits, "bits per byte", range(len(bits)), label="GPT on a GPU",
            corpus="python_docs", split="test part of split_text", test_bytes=len(test),
            parameters=sum(p.numel() for p in plain.parameters()), shape=asdict(plain.config),
            plan=asdict(BEST), runs=runs,
            rule=f"as the GPT's, from {window // 2 + 1} to {window} bytes before")


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


SECTIONS = ("ceilings", "memory", "ladder", "race", "shakespeare", "rung")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=str(best_device()), choices=("cuda", "cpu"))
    parser.add_argument("--data", help="TinyShakespeare's text")
    parser.add_argument("--tiny", action="store_true", help="every branch in tiny sizes, no records")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--race-batch", type=int, default=32, help="windows of GPT-2 in the race")
    parser.add_argument("--ours", nargs="*", default=[], metavar="FIELD=VALUE",
                        help="change the fast Shakespeare run, e.g. max_steps=800 muon_lr=0.03")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", default="build/gpu", help="folder for logs")
    options = parser.parse_args()
    if options.tiny:
        os.environ["LLM_BOOK_LEDGER"] = tempfile.mkdtemp()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench(options)
    for section in SECTIONS:
        if section in options.only or section == "ceilings":  # which the others need
            print(f"== {section}, {options.device}", flush=True)
            getattr(bench, section)()


if __name__ == "__main__":
    sys.exit(main())
