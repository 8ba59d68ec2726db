"""The rung of chapter 15: chapter 14's yardstick, by the recipe of shakespeare.py, on two threads.

No more parameters and seconds than chapter 14's GPT has. Nothing was tuned on this corpus: the
recipe comes from Shakespeare, and the number of steps from the clock.

    python benchmarks/train.py
"""
import time

import common
import numpy as np
import torch
from gpt import RULE, bits
from shakespeare import LONG, T, attention, make_config, make_model

from llm_book.text import load_corpus, split_text
from llm_book.train import train

SEEDS, STEPS = (0, 1, 2), 520


def main() -> None:
    torch.set_num_threads(2)
    parts = [np.frombuffer(part.encode(), np.uint8)
             for part in split_text(load_corpus("python_docs").text)]
    rows = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model, started = make_model(LONG, 256), time.perf_counter()
        with attention(LONG):
            train(model, parts[0], parts[1][:T + 1], make_config(LONG, STEPS, seed), progress=False)
        seconds = time.perf_counter() - started
        rows.append((bits(model, parts[2]), bits(model, parts[1]), seconds))
    test, validation, seconds = (list(column) for column in zip(*rows))
    bench = common.Bench("ladder", SEEDS, "python benchmarks/train.py")
    bench.report(
        "gpt_recipe", test, "bits per byte", label="GPT, better recipe, 40 s", corpus="python_docs",
        split="test part of split_text", test_bytes=len(parts[2]), train_bytes=len(parts[0]), rule=RULE,
        validation=float(np.mean(validation)), parameters=sum(p.numel() for p in model.parameters()),
        recipe=f"{STEPS} steps of Muon and AdamW on {LONG.batch_size} × {T} bytes",
        bytes_read=STEPS * LONG.batch_size * T, seconds=float(np.mean(seconds)),
        threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
