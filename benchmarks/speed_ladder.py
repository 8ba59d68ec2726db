"""The speed ladder of chapter 16: the same updates of a GPT on Python's documentation, made faster
step by step, each with its speed, its memory, and the proof that the loss is the same.

    python benchmarks/speed_ladder.py                # on the fastest device at hand
    python benchmarks/speed_ladder.py --help         # sizes, rungs to leave out, ledger

`benchmarks/gpu.py` climbs it on a CPU and writes what chapter 16 quotes, `benchmarks/on_gpu.py` on
a GPU.
"""
import argparse
import gc
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._triton import has_triton

from llm_book.gpt import GPT, GPTConfig
from llm_book.gpu import (
    checkpoint_blocks,
    matmul_peak,
    mfu,
    peak_bytes,
    seconds_per_call,
    train_flops_per_token,
)
from llm_book.lab import best_device, record, require
from llm_book.optim import AdamW
from llm_book.text import load_corpus, split_text
from llm_book.train import Run, TrainConfig, draw_batches, evaluate, make_optimizers, update

RUNGS = (  # what each one changes; all others stay
    ("float32", {}),
    ("TF32", {"tf32": True}),  # products of float32 with 11 binary digits
    ("bfloat16", {"precision": "bfloat16"}),  # autocast; weights stay float32
    ("fused optimizer", {"fused_optimizer": True}),  # one kernel for all of AdamW
    ("fused attention", {"fused_attention": True}),  # scores never reach the memory
    ("compile", {"compiled": True}),
    ("larger batch", {"whole_batch": True}),  # an update in one pass, no accumulation
    ("checkpointing", {"checkpointing": True}),
)
START = {"tf32": False, "precision": "float32", "fused_optimizer": False, "fused_attention": False,
         "compiled": False, "whole_batch": False, "checkpointing": False, "weights": torch.float32}
SIZES = {  # the model; windows in a forward pass, and forward passes in an update
    "tiny": (GPTConfig(256, max_len=64, n_layers=2, d_model=64, n_heads=4), 4, 4),
    "small": (GPTConfig(256, max_len=128, n_layers=4, d_model=128, n_heads=4), 8, 4),
    "shakespeare": (GPTConfig(256, max_len=256, n_layers=6, d_model=384, n_heads=6), 16, 4),
    # A multiple of 64 tokens suits the hardware; the last 47 never occur.
    "gpt2": (GPTConfig.preset("gpt2", vocab_size=50_304), 8, 4),
}
WARM_UP = 2  # updates that are not timed: compilation, the optimizer's memory


def docs() -> tuple[np.ndarray, ...]:
    """Training, validation and test bytes of the book's corpus."""
    return tuple(np.frombuffer(part.encode(), np.uint8)
                 for part in split_text(load_corpus("python_docs").text))


def unavailable(
    change: dict,  # of one rung
    device: torch.device,
) -> str | None:
    """Why a device cannot do it, or None."""
    if change.get("tf32"):
        if device.type != "cuda":
            return "needs an NVIDIA GPU"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs a GPU with TF32 (Ampere or later)"
    if change.get("precision") == "bfloat16" and device.type == "cuda" and (
            not torch.cuda.is_bf16_supported(including_emulation=False)):
        return "needs a GPU with bfloat16"
    if change.get("compiled"):
        if device.type == "cuda" and not has_triton():
            return "needs the package triton"
        if device.type == "cpu" and not any(map(shutil.which, (
                os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))):
            return "needs a C++ compiler (g++ or clang++)"
    return None


# ---- one run

@contextmanager
def switches(settings: dict) -> Iterator[None]:
    """The global switches of a rung, put back at the end."""
    before = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, before)
        torch.set_float32_matmul_precision("high" if settings["tf32"] else "highest")
        if not settings["fused_attention"]:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def first_model(config: GPTConfig, plan: TrainConfig, device, weights: torch.dtype, twin: int) -> GPT:
    """The same weights for each rung; a twin's are off by what bfloat16 cannot tell apart."""
    torch.manual_seed(plan.seed)
    model, generator = GPT(config), torch.Generator().manual_seed(twin)
    if twin:
        for p in model.parameters():
            p.data *= 1 + 2**-8 * (2 * torch.rand(p.shape, generator=generator) - 1)
    return model.to(device, weights)


def adamw(model: GPT, plan: TrainConfig, fused: bool) -> list:
    """AdamW with chapter 15's groups: torch's in one kernel, or chapter 7's."""
    groups = [{key: group[key] for key in ("params", "weight_decay", "max_lr")}
              for optimizer in make_optimizers(model, plan) for group in optimizer.param_groups]
    make = partial(torch.optim.AdamW, fused=True) if fused else AdamW
    return [make(groups, betas=plan.betas)]


def draw_whole(run: Run, tokens) -> list[tuple[Tensor, Tensor]]:
    """The same windows as one large batch; others would make it another experiment."""
    return [tuple(torch.cat(part) for part in zip(*draw_batches(run, tokens)))]


def prepare(model: GPT, plan: TrainConfig, settings: dict) -> Run:
    """Chapter 15's run as a rung wants it."""
    model = checkpoint_blocks(model) if settings["checkpointing"] else model
    plan = replace(plan, precision=settings["precision"], compile=settings["compiled"])
    return Run(model, plan, adamw(model, plan, settings["fused_optimizer"]),
               draw=draw_whole if settings["whole_batch"] else draw_batches)


def climb(config: GPTConfig, tokens_train, tokens_val, plan: TrainConfig, device: torch.device,
          settings: dict, twin: int = 0) -> dict:
    """One run: the seconds of each update, the most memory, and the loss after it.

    The last update is not timed but watched for its memory; the loss is computed in float32.
    """
    gc.collect()  # what an earlier run left behind would count as memory of this one
    model = first_model(config, plan, device, settings["weights"], twin)
    with switches(settings):
        run = prepare(model, plan, settings)
        run.model.train()
        step = lambda: update(run, run.draw(run, tokens_train))
        seconds = [seconds_per_call(step, device, 1, 0)[0] for _ in range(plan.max_steps - 1)]
        model.zero_grad(set_to_none=True)
        resident = 3 * sum(p.nbytes for p in model.parameters())  # with AdamW's two means
        peak = None if twin or device.type == "mps" else peak_bytes(step, device, resident)
        if peak is None:
            step()
    loss = evaluate(model.float(), tokens_val, plan.seq_len, n_windows=plan.eval_windows)
    return {"seconds": seconds, "peak_bytes": peak, "loss": loss}


# ---- the ladder

def judged(name: str, run: Callable, settings: dict, first: dict | None, twins: int) -> dict:
    """A rung's run, judged by the `first` one, or by its own twins if it is the first."""
    row = {"rung": name, **run(settings)}
    if first is None:
        off = [run(settings, twin)["loss"] - row["loss"] for twin in range(1, twins + 1)]
        return row | {"difference": 0.0, "noise": float(np.sqrt(np.mean(np.square(off)))),
                      "same": True}
    difference = row["loss"] - first["loss"]
    return row | {"difference": difference, "noise": first["noise"],
                  "same": abs(difference) <= 3 * first["noise"]}


def with_speed(row: dict, config: GPTConfig, plan: TrainConfig, peak_flops: float) -> dict:
    """A row with tokens per second (medians of up to five stretches of the run) and MFU."""
    if "seconds" not in row:
        return row
    timed = row["seconds"][WARM_UP:]
    stretches = [np.median(part) for part in np.array_split(timed, min(5, len(timed)))]
    tokens = plan.batch_size * plan.accumulation_steps * plan.seq_len
    rates = [float(tokens / seconds) for seconds in stretches]
    share = mfu(float(np.median(rates)), train_flops_per_token(config, plan.seq_len), peak_flops)
    return row | {"rates": rates, "tokens_per_second": float(np.median(rates)), "mfu": share}


def speed_ladder(
    config: GPTConfig,
    tokens_train,  # what `get_batch` takes
    tokens_val,
    plan: TrainConfig,  # every rung does these updates on these batches
    *,
    device: torch.device | str | None = None,  # the fastest at hand
    rungs: Sequence[tuple[str, dict]] = RUNGS,  # the first one is what the others must agree with
    twins: int = 4,  # runs that measure the noise
    peak_flops: float | None = None,  # for the MFU; measured if not given
) -> Iterator[dict]:
    """A row for each rung as it comes: its speed, memory and loss, or why it was skipped."""
    require(plan.max_steps >= WARM_UP + 2, "max_steps", f"at least {WARM_UP + 2}", plan.max_steps)
    require(plan.optimizer == "adamw", "optimizer", "'adamw'", plan.optimizer)
    require(twins >= 2, "twins", "at least 2", twins)
    device = torch.device(device or best_device())
    run = partial(climb, config, tokens_train, tokens_val, plan, device)
    peak_flops = peak_flops or max(matmul_peak(device, dtype)
                                   for dtype in (torch.float32, torch.bfloat16))
    settings, first = dict(START), None
    for name, change in rungs:
        reason = unavailable(change, device)
        settings |= {} if reason else change
        try:
            row = {"rung": name, "skipped": reason} if reason else judged(
                name, run, settings, first, twins)
        except torch.OutOfMemoryError:
            row = {"rung": name, "skipped": "out of memory"}
        first = first or (None if "skipped" in row else row)
        yield with_speed(row, config, plan, peak_flops)


def ladder_table(
    rows: Sequence[dict],  # of `speed_ladder`
) -> str:
    """The rows for reading."""
    lines = [f"{'rung':16} {'tokens/s':>9} {'MFU':>6} {'peak MB':>9}  loss"]
    for row in rows:
        if "skipped" in row:
            lines.append(f"{row['rung']:16} {row['skipped']:>9}")
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        verdict = "" if row["same"] else "  NOT THE SAME"
        lines.append(f"{row['rung']:16} {row['tokens_per_second']:9,.0f} {row['mfu']:6.1%} "
                     f"{peak:>9}  {row['loss']:.4f} ({row['difference']:+.4f}){verdict}")
    noise = next((row["noise"] for row in rows if "noise" in row), None)
    return "\n".join([*lines, "no rung ran" if noise is None else
                      f"noise of the loss {noise:.4f}; same means within three times that"])


# ---- the ledger

def ladder_key(
    rung: str,  # its name
    device_type: str,  # "cuda", "cpu"
    preset: str,  # one of `SIZES`
) -> str:
    """Where the ledger keeps a rung."""
    return f"gpu/{device_type}_{preset}.{rung.lower().replace(' ', '_')}"


def record_ladder(rows: Sequence[dict], device_type: str, preset: str, command: str,
                  **context) -> None:
    """Write each row that was measured into the ledger, in tokens per second."""
    for row in rows:
        if "skipped" not in row:
            facts = {key: row[key] for key in ("mfu", "peak_bytes", "loss", "difference", "noise",
                                               "same")}
            record(ladder_key(row["rung"], device_type, preset), row["rates"], "tokens per second",
                   seeds=range(len(row["rates"])), command=command, rung=row["rung"],
                   preset=preset, first_update_seconds=row["seconds"][0], **facts, **context)


# ---- the command line

def arguments() -> argparse.ArgumentParser:
    """What the command line understands."""
    parser = argparse.ArgumentParser("python benchmarks/speed_ladder.py", description=(
        "Climb the speed ladder: the same updates of a GPT on Python's documentation, made faster "
        "step by step, each with its speed, memory, and proof that the loss is the same."))
    parser.add_argument("--device", default=str(best_device()), choices=("cuda", "mps", "cpu"),
                        help="where to run (here by default: %(default)s)")
    parser.add_argument("--preset", choices=SIZES, help="size of the model; by default gpt2 (124M) "
                        "on a GPU, small on a CPU")
    parser.add_argument("--steps", type=int, default=30,
                        help="updates of each rung, at least 4 (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="windows in one forward pass")
    parser.add_argument("--accumulation", type=int, help="forward passes in one update")
    parser.add_argument("--twins", type=int, default=4,
                        help="runs that measure the noise, at least 2 (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--skip", nargs="*", default=[], metavar="RUNG", help="rungs to leave out: "
                        + ", ".join(name for name, _ in RUNGS[1:]))
    parser.add_argument("--record", action="store_true", help="write the rows into the ledger")
    return parser


def main(
    argv: Sequence[str] | None = None,  # the words after the program's name
) -> list[dict]:
    """Run the ladder as the command line says, and print it."""
    parser = arguments()
    options = parser.parse_args(argv)
    if unknown := set(options.skip) - {name for name, _ in RUNGS[1:]}:
        parser.error(f"argument --skip: no such rung: {', '.join(sorted(unknown))}")
    device = torch.device(options.device)
    if device.type != "cpu" and not getattr(torch, device.type).is_available():
        parser.error(f"argument --device: there is no {options.device} device here")
    if options.threads:
        torch.set_num_threads(options.threads)
    preset = options.preset or ("small" if device.type == "cpu" else "gpt2")
    config, batch_size, passes = SIZES[preset]
    tokens_train, tokens_val, _ = docs()
    plan = TrainConfig(options.steps, batch_size=options.batch_size or batch_size,
                       accumulation_steps=options.accumulation or passes, seq_len=config.max_len,
                       warmup_steps=options.steps // 8, eval_windows=64, seed=options.seed)
    rungs = [rung for rung in RUNGS if rung[0] not in options.skip]
    rows = list(speed_ladder(config, tokens_train, tokens_val, plan, device=device, rungs=rungs,
                             twins=options.twins))
    print(ladder_table(rows))
    if options.record:
        command = f"python benchmarks/speed_ladder.py --device {device.type} --preset {preset}"
        record_ladder(rows, device.type, preset, command, steps=plan.max_steps,
                      windows=[plan.batch_size, plan.accumulation_steps, plan.seq_len],
                      threads=torch.get_num_threads())
    return rows


if __name__ == "__main__":
    main()
