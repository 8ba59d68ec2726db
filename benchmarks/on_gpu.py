"""One script for a GPU that is there for a few minutes: the most important things first, each recorded
as soon as it is measured, and no part begun that the time does not allow.

In this order: does it work on the card (tests marked for a GPU, a training step, generation, resuming
a run); the two ceilings; GPT-2 124M in turns with transformers and plain torch; the speed ladder with
its proof of the loss; Shakespeare with 6 layers, 6 heads and width 384; the GPU's rung of the book's
ladder. Records go into the ledger, logs and a copy of the ledger into --out.

    python benchmarks/on_gpu.py --seconds 540 --out DIR --data FILE    # FILE: Shakespeare's plays
    python benchmarks/on_gpu.py --seconds 540 --out DIR --only checks race
    python benchmarks/on_gpu.py --tiny --out DIR                       # every branch, on a CPU

It needs torch, transformers and what the book needs at run time, and runs in a bare checkout. A tiny
run measures nothing: it writes into a ledger in --out, under keys of its own.
"""
import argparse
import functools
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # a bare checkout is not installed
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "0")  # time is short

import common
import gpt as chapter14  # benchmarks/gpt.py, for its yardstick
import gpu as chapter16  # benchmarks/gpu.py, for what both devices measure
import numpy as np
import torch
from speed_ladder import docs
from transformers.utils import logging

import llm_book
from llm_book.generate import generate
from llm_book.gpt import GPT, GPTConfig
from llm_book.lab import ledger_folder, write_whole
from llm_book.tokens import CharTokenizer
from llm_book.train import Run, TrainConfig, train, update

COMMAND, ROOT, BEGUN = "python benchmarks/on_gpu.py", Path(__file__).resolve().parents[1], time.monotonic()
TARGET = 1.4697  # nats: the best validation loss of the well-known recipe, as its author tells it

# Shakespeare by characters. The recipe is nanoGPT's train_shakespeare_char; the shape is the same.
SHAPE = dict(max_len=256, n_layers=6, d_model=384, n_heads=6, dropout=0.2, bias="none")
MODERN = dict(positions="rotary", qk_norm=True, feed_forward="swiglu")  # and layer norm, as there
RECIPE = TrainConfig(5_000, batch_size=64, seq_len=256, max_lr=1e-3, min_lr=1e-4, warmup_steps=100,
                     betas=(0.9, 0.99), eval_every=250, eval_windows=0, checkpoint_every=5_000)
FAST = replace(RECIPE, max_steps=600, batch_size=128, optimizer="muon", muon_lr=0.02, max_lr=3e-3,
               min_lr=0.0, warmup_steps=40, schedule="linear", betas=(0.9, 0.95), eval_every=600)
BEST = replace(FAST, max_steps=1_500, eval_every=250)
SMALL = GPTConfig(64, max_len=32, n_layers=2, d_model=64, n_heads=4, positions="rotary")  # of the checks


class TimeIsUp(BaseException):
    """The part that runs has used up what was left; no handler of errors inside it may keep it."""


# ---- does it work on the card

def small_model(device: torch.device | str, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(SMALL).to(device)


def plan(**changes) -> TrainConfig:
    return TrainConfig(**{**dict(max_steps=8, batch_size=4, seq_len=32, max_lr=3e-3, warmup_steps=0,
                                 schedule="constant", accumulation_steps=2, eval_every=4,
                                 eval_windows=4, checkpoint_every=4), **changes})


TOKENS = np.arange(5_000) % 61 % 7


def same_training(device: torch.device) -> str:
    """Losses and weights after a few steps are those of the CPU, with either optimizer."""
    worst = 0.0
    for optimizer in ("adamw", "muon"):
        models = [small_model(place) for place in ("cpu", device)]
        losses = [[entry["loss"] for entry in train(model, TOKENS, TOKENS, plan(optimizer=optimizer),
                                                    progress=False)] for model in models]
        np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
        worst = max(worst, float(np.abs(np.subtract(*losses)).max()))
    low = train(small_model(device), TOKENS, TOKENS, plan(precision="bfloat16"), progress=False)
    assert low[-1]["loss"] < low[0]["loss"] and math.isfinite(low[-1]["val_loss"])
    return f"losses differ from the CPU's by at most {worst:.1e}"


def no_waiting(device: torch.device) -> str:
    """Four micro-batches make the CPU wait for the GPU no more often than one."""
    waits = []
    for n in (1, 4):
        run = Run(small_model(device), plan(accumulation_steps=n))
        update(run, run.draw(run, TOKENS))  # memory and kernels are there afterwards
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            update(run, run.draw(run, TOKENS))
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(one.message) for one in found))
    assert waits[0] == waits[1], waits
    return f"{waits[0]} synchronisations in an update, with 1 micro-batch and with 4"


def same_text(device: torch.device) -> str:
    """Greedy text on the device: the same with and without a cache, and the logits are the CPU's."""
    model, here = small_model("cpu").eval(), small_model(device).eval()
    ids = torch.from_numpy(TOKENS[None, :8].copy())
    with torch.no_grad():
        ours, theirs = here(ids.to(device))[0].cpu(), model(ids)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    texts = [generate(here, ids.to(device), 20, temperature=0, use_cache=cache) for cache in (True, False)]
    assert texts[0].equal(texts[1]) and texts[0].device.type == device.type
    return f"logits differ from the CPU's by at most {(ours - theirs).abs().max():.1e}"


def same_after_resume(device: torch.device) -> str:
    """A run that stopped half-way ends as one that did not, on the device and moved to the CPU."""
    whole = small_model(device)
    train(whole, TOKENS, TOKENS, plan(), progress=False)
    for place in (device, "cpu"):
        with tempfile.TemporaryDirectory() as folder:
            train(small_model(device), TOKENS, TOKENS, plan(max_steps=4), out_dir=folder, progress=False)
            model = small_model(place, seed=1)  # its weights come from the folder
            history = train(model, TOKENS, TOKENS, plan(), out_dir=folder, progress=False)
        assert [entry["step"] for entry in history] == list(range(1, 9))
        for a, b in zip(model.parameters(), whole.parameters()):
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-2, atol=1e-3)
    return "continued on the device and on the CPU"


def marked_tests(most: int | None = None) -> str:
    """The tests that need a GPU, in a process of their own, where pytest is installed."""
    missing = [name for name in ("pytest", "hypothesis", "beartype") if not importlib.util.find_spec(name)]
    if missing:
        return f"not run: {', '.join(missing)} is not installed"
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "_on_a_gpu(" in path.read_text()]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "on_a_gpu",
                           *map(str, files[-most:] if most else files)], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-2_000:], done.stderr[-1_000:], flush=True)
    assert done.returncode == 0, "tests failed"
    return done.stdout.strip().splitlines()[-1]


# ---- what is measured

class OnGPU(chapter16.Bench):
    """Chapter 16's measurements, and those that only a GPU can make, within a time."""

    def __init__(self, options: argparse.Namespace):
        super().__init__("cpu" if options.tiny else "cuda", options.out, COMMAND, options.tiny)
        self.options, self.stop = options, BEGUN + options.seconds
        self.found: dict[str, list[dict]] = {}  # Shakespeare's runs

    def left(self) -> float:
        """Seconds until the end."""
        return self.stop - time.monotonic()

    def checks(self) -> None:
        passed, failed = {}, {}
        for check in (same_training, no_waiting, same_text, same_after_resume):
            try:
                passed[check.__name__] = check(self.device)
                print(f"{check.__name__}: {passed[check.__name__]}", flush=True)
            except Exception as error:
                failed[check.__name__] = str(error)
                traceback.print_exc(file=sys.stdout)
        self.record("checks", len(passed), "checks passed", of=len(passed) + len(failed),
                    passed=passed, failed=failed)
        assert not failed, f"failed: {', '.join(failed)}"

    def tests(self) -> None:
        print(marked_tests(1 if self.tiny else None), flush=True)

    def limits(self) -> None:
        self.ceilings()
        self.bandwidth()

    # ---- training runs

    def shakespeare(self, name: str, seed: int) -> None:
        """One run, and the records of all such runs so far."""
        text = Path(self.options.data).read_text(encoding="utf-8")
        tokenizer = CharTokenizer(text)
        ids = np.array(tokenizer.encode(text), np.uint16)
        cut = int(0.9 * len(ids))
        tokens = (ids[:cut], ids[cut:cut + 3_000] if self.tiny else ids[cut:])
        shape, config = {"recipe": (SHAPE, RECIPE), "fast": (SHAPE | MODERN, FAST),
                         "best": (SHAPE | MODERN, BEST)}[name]
        _, run = self.run(f"shakespeare_{name}_{seed}", tokens, tokenizer.vocab_size, shape,
                          replace(config, seed=seed))
        runs = self.found.setdefault(name, [])
        runs.append(run)
        self.record_runs(name, shape=shape, plan=asdict(config), runs=runs)

    def record_runs(self, name: str, **context) -> None:
        def column(key: str, of: str = name) -> np.ndarray:
            return np.array([run[key] for run in self.found[of]])

        key = {"recipe": "shakespeare_recipe", "fast": "shakespeare", "best": "shakespeare_best"}[name]
        self.record(f"{key}_loss", column("val_loss"), "nats per character", target=TARGET,
                    best=column("best_val_loss").tolist(), **context)
        self.record(f"{key}_seconds", column("seconds"), "seconds")
        n = min(len(self.found.get(which, ())) for which in ("fast", "recipe"))
        if n:
            ours, recipe = column("seconds", "fast")[:n], column("seconds", "recipe")[:n]
            both = [sum(column(part, of)[:n] for part in ("seconds", "compile_seconds"))
                    for of in ("fast", "recipe")]
            self.record("shakespeare_time", ours / recipe, "ratio of times, evaluations included, "
                        "compilation not", with_compilation=float(np.mean(both[0] / both[1])))

    def run(self, name: str, tokens: tuple, vocab_size: int, shape: dict, config: TrainConfig) -> tuple:
        """A model trained with chapter 15's loop, and what there is to say about it; its log in `out`."""
        if self.tiny:
            shape = {**shape, "max_len": 16, "n_layers": 1, "d_model": 16, "n_heads": 2}
            config = replace(config, max_steps=4, seq_len=16, batch_size=2, warmup_steps=1, eval_every=2)
        config = replace(config, precision=self.precision, compile=self.compiles())
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high" if self.cuda else "highest")
        model, started = GPT(GPTConfig(vocab_size, **shape)).to(self.device), time.perf_counter()
        if config.compile:
            torch.compiler.reset()
            self.rehearse(model, tokens, config)
        compiled = time.perf_counter() - started
        started = time.perf_counter()
        history = train(model, *tokens, config, progress=False)  # evaluations included
        seconds = time.perf_counter() - started
        torch.set_float32_matmul_precision("highest")
        about = {"shape": shape, "plan": asdict(config), "seconds": seconds}
        (self.out / f"{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in (about, *history)))
        losses = [entry["val_loss"] for entry in history if "val_loss" in entry]
        print(f"{name}: val_loss={losses[-1]:.4f} best={min(losses):.4f} seconds={seconds:.1f}", flush=True)
        return model, {"val_loss": losses[-1], "best_val_loss": min(losses), "seconds": seconds,
                       "compile_seconds": compiled, "steps": config.max_steps, "val_losses": losses}

    def rehearse(self, model: GPT, tokens: tuple, config: TrainConfig) -> None:
        """Compile what training needs, and put the weights back."""
        before = {name: value.clone() for name, value in model.state_dict().items()}
        short = replace(config, max_steps=3, warmup_steps=1, eval_every=3)
        train(model, tokens[0], tokens[1][:1_000], short, progress=False)
        model.load_state_dict(before)
        model.zero_grad(set_to_none=True)

    def rung(self, seed: int) -> None:
        """The GPU's rung of the book's ladder: one more seed, and the record of all so far."""
        train_tokens, val_tokens, test = docs()
        if self.tiny:
            val_tokens, test = val_tokens[:2_000], test[:2_000]
        model, run = self.run(f"rung_{seed}", (train_tokens, val_tokens), 256, SHAPE | MODERN,
                              replace(BEST, seed=seed))
        run["bits"] = chapter14.bits(Elsewhere(model), test)
        runs = self.found.setdefault("rung", [])
        runs.append(run)
        window, bits = model.config.max_len, [run["bits"] for run in runs]
        common.Bench("ladder", command=COMMAND).report(
            "tiny_gpt" if self.tiny else "gpt_gpu", bits, "bits per byte", range(len(bits)),
            label="GPT on a GPU", corpus="python_docs", split="test part of split_text",
            test_bytes=len(test), parameters=sum(p.numel() for p in model.parameters()),
            shape=asdict(model.config), plan=asdict(BEST), runs=runs,
            recipe=f"{BEST.max_steps:,} steps of Muon and AdamW on {BEST.batch_size} × {BEST.seq_len} bytes",
            seconds=float(np.mean([run["seconds"] for run in runs])),
            rule=f"as the GPT's, from {window // 2 + 1} to {window} bytes before")

    # ---- one after another

    def parts(self) -> list[tuple[str, float, Callable]]:
        """Section, the seconds that it may take on a large GPU, and what to do."""
        parts = [("checks", 20, self.checks), ("tests", 60, self.tests), ("ceilings", 10, self.limits),
                 ("race", 40, self.race)]
        if self.compiles():
            parts.append(("race", 90, functools.partial(self.race, True)))
        parts.append(("ladder", 60, lambda: self.ladder(self.left)))
        for seed in range(1 if self.tiny else 3):
            parts += [("shakespeare", seconds, functools.partial(self.shakespeare, name, seed))
                      for name, seconds in (("fast", 50), ("best", 60), ("recipe", 90))
                      if self.options.data]
            parts.append(("rung", 60, functools.partial(self.rung, seed)))
        return [*parts, ("memory", 30, self.memory)]

    def attempt(self, work: Callable) -> str:
        """Do it, and say what came of it; no error goes further."""
        def stop(*signal_and_frame):
            raise TimeIsUp("the time is up")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(max(1, math.ceil(self.left())))
        try:
            work()
            return "done"
        except (Exception, TimeIsUp) as error:
            traceback.print_exc(file=sys.stdout)
            return f"failed: {type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
            torch.set_float32_matmul_precision("highest")
            gc.collect()
            torch.cuda.empty_cache()
            self.keep()

    def keep(self) -> None:
        """Copy the ledger to the logs; name the commit where there is no git to ask."""
        for path in (ledger_folder() / "gpu.json", ledger_folder() / "ladder.json"):
            if path.exists():
                records = json.loads(path.read_text())
                for entry in records.values():
                    entry["commit"] = entry["commit"] or self.options.commit
                write_whole(path, json.dumps(records, indent=1, sort_keys=True) + "\n")
                if path.parent != self.out:
                    shutil.copy(path, self.out)

    def all(self) -> bool:
        """Whether all that was begun ended well."""
        summary = []
        for section, needed, work in self.parts():
            if section not in self.options.only:
                continue
            started, seconds_left = time.monotonic(), self.left()
            print(f"== {section}, {seconds_left:.0f} s left", flush=True)
            begin = seconds_left > (0 if self.tiny else needed)
            end = self.attempt(work) if begin else f"not begun: it may take {needed} s"
            summary.append({"part": section, "end": end, "seconds": round(time.monotonic() - started, 1)})
            print(f"-- {section}: {end}, after {summary[-1]['seconds']} s", flush=True)
            write_whole(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        if not self.options.data and "shakespeare" in self.options.only:
            print("Shakespeare: skipped, name the file of his plays with --data", flush=True)
        return not any(part["end"].startswith("failed") for part in summary)


class Elsewhere:
    """A model on a GPU for those who ask and expect the answer on the CPU."""

    def __init__(self, model: GPT):
        self.model, self.config, self.eval = model, model.config, model.eval

    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.model(ids.to(self.model.device))[0].cpu(), None


class Tee:
    """What is printed, also in a file."""

    def __init__(self, *files):
        self.files = files

    def write(self, text: str) -> None:
        for file in self.files:
            file.write(text)

    def flush(self) -> None:
        for file in self.files:
            file.flush()


def name_the_version() -> None:
    """A record names the version of what is installed, and a bare checkout is not."""
    try:
        importlib.metadata.version("llm_book")
    except importlib.metadata.PackageNotFoundError:
        folder = Path(tempfile.mkdtemp()) / f"llm_book-{llm_book.__version__}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: llm_book\nVersion: {llm_book.__version__}\n")
        sys.path.append(str(folder.parent))


SECTIONS = ("checks", "tests", "ceilings", "race", "ladder", "shakespeare", "rung", "memory")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=540, help="in all (default: %(default)s)")
    parser.add_argument("--out", default="build/on_gpu", help="folder for logs and a copy of the ledger")
    parser.add_argument("--data", help="Shakespeare's plays in one file; without it they are left out")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--commit", help="of this checkout, where there is no git to ask")
    parser.add_argument("--tiny", action="store_true", help="every branch in tiny sizes on a CPU")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("there is no GPU here; nothing is measured (--tiny tries every branch on a CPU)")
        return 0
    if options.tiny:
        os.environ["LLM_BOOK_LEDGER"] = str(Path(options.out) / "ledger")
        # what is compiled is traced as ever, but no code is written, which would take minutes
        torch.compile = functools.partial(torch.compile, backend="eager")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name_the_version()
    bench = OnGPU(options)
    with open(bench.out / "log.txt", "a") as log, redirect_stdout(Tee(sys.stdout, log)):
        return 0 if bench.all() else 1


if __name__ == "__main__":
    sys.exit(main())
