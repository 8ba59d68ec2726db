"""The small runs of chapter 18: six sizes, each at several lengths; and runs on part of the text.

Every run is written into the ledger when it ends, and is skipped if it is there already.

    python benchmarks/scaling.py                 # all that is missing, about twelve minutes of one core
    python benchmarks/scaling.py --only w032     # one of them, again
"""
import argparse
import time

import numpy as np
import torch

from llm_book.gpt import GPT, GPTConfig
from llm_book.lab import recall, record
from llm_book.scaling import count_parameters, train_branches
from llm_book.text import load_corpus, split_text
from llm_book.train import TrainConfig

WIDTHS = (16, 32, 48, 80, 128, 192)
LENGTHS = (150, 300, 600, 1_200, 2_400)  # steps
SHORTER = {192: LENGTHS[:-1]}
FRACTIONS = (4, 32)  # a quarter of the training text, a thirty-second
COMMAND = "python benchmarks/scaling.py --only {}"


def shape(width: int) -> GPTConfig:
    return GPTConfig(256, max_len=64, n_layers=2, d_model=width, n_heads=width // 16, positions="rotary",
                     norm="rms", feed_forward="swiglu", bias="none", qk_norm=True)


def plan(steps: int, **changes) -> TrainConfig:
    return TrainConfig(**{**dict(
        max_steps=steps, batch_size=8, seq_len=64, optimizer="muon", muon_lr=0.02, max_lr=1e-2, min_lr=1e-4,
        warmup_steps=40, schedule="wsd", eval_windows=512), **changes})


def facts(width: int, config: TrainConfig, text: np.ndarray) -> dict:
    blocks, tables = count_parameters(shape(width))
    return dict(width=width, layers=2, block_parameters=blocks, table_parameters=tables, corpus="python_docs",
                split="split_text: trained on the first part, asked on the second", train_bytes=len(text),
                batch=config.batch_size, context=config.seq_len, windows=config.eval_windows,
                recipe="Muon 0.02, AdamW 0.01, warm-up 40 steps, wsd", threads=torch.get_num_threads())


def fresh(width: int, seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(shape(width))


def sizes(name: str, width: int, text: np.ndarray, questions: np.ndarray, seed: int = 0) -> None:
    """One size at all lengths."""
    configs = [plan(steps, seed=seed) for steps in SHORTER.get(width, LENGTHS)]
    start = time.process_time()
    results = train_branches(fresh(width, seed), text, questions, configs)
    per_step = configs[0].batch_size * configs[0].seq_len
    entry = record(
        f"scaling/{name}", results[-1]["loss"], "nats per byte", seeds=[seed], command=COMMAND.format(name),
        tokens=[per_step * result["steps"] for result in results], losses=[r["loss"] for r in results],
        train_losses=[r["train_loss"] for r in results],
        trunk_tokens=[per_step * result["trunk_steps"] for result in results],
        trunk_losses=[r["trunk_loss"] for r in results], cpu_seconds=time.process_time() - start,
        **facts(width, configs[0], text))
    print(f"{name}: {np.round(entry['context']['losses'], 4)} in {entry['context']['cpu_seconds']:.0f} s", flush=True)


def part(name: str, fraction: int, text: np.ndarray, questions: np.ndarray) -> None:
    """Width 80 on part of the text, again and again."""
    sizes(name, 80, text[:len(text) // fraction], questions)


def main() -> None:
    runs = {f"w{width:03}": (sizes, width) for width in WIDTHS}
    runs |= {f"part_{fraction}": (part, fraction) for fraction in FRACTIONS}
    runs |= {f"w032_seed{seed}": (lambda *a, seed=seed: sizes(*a, seed=seed), 32) for seed in (1,)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=runs, help="one run, even if the ledger has it")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    parts = split_text(load_corpus("python_docs").text)
    text, questions, _ = (np.frombuffer(part.encode(), np.uint8) for part in parts)
    for name, (run, argument) in runs.items():
        try:
            done = recall(f"scaling/{name}")
        except KeyError:
            done = None
        if name == only or not (only or done):
            run(name, argument, text, questions)


if __name__ == "__main__":
    main()
