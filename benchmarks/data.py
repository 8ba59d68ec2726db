"""Random batches from a token file beside the common row-by-row loop, and writing one, on one core.

    python benchmarks/data.py
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from llm_book.data import TokenFile, get_batch
from llm_book.lab import record

RUNS = range(7)
COMMAND = "python benchmarks/data.py"
N_IDS = 10_000_000
SIZES = ((12, 1024), (64, 256))  # nanoGPT's train.py and config/train_shakespeare_char.py


class Vocabulary:
    """As much of a tokenizer as a token file needs."""

    vocab_size = 50_257

    def save(self, path):
        Path(path).write_text("benchmark")


def seconds(work, times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def batch_by_loop(ids: np.memmap, batch_size: int, seq_len: int, generator: torch.Generator):
    """The peer: slice, widen and wrap each row by itself, then stack."""
    starts = torch.randint(len(ids) - seq_len, (batch_size,), generator=generator)
    x = torch.stack([torch.from_numpy(ids[s:s + seq_len].astype(np.int64)) for s in starts])
    y = torch.stack([torch.from_numpy(ids[s + 1:s + 1 + seq_len].astype(np.int64)) for s in starts])
    return x, y


def report(name: str, values: list[float], unit: str, **context) -> None:
    entry = record(f"data/{name}", values, unit, seeds=list(RUNS), command=COMMAND, cores=1,
                   n_ids=N_IDS, **context)
    print(f"{name}: {entry['value']:.3f} ± {entry['sd']:.3f} {unit}")


def measure_batches(path: Path, batch_size: int, seq_len: int) -> None:
    """Both draw from the same file, which is in the page cache, each through its own map."""
    tokens, mapped = TokenFile(path), np.memmap(path, "<u2", "r", offset=64)
    ours, theirs = [], []
    generator = torch.Generator()
    for run in RUNS:
        a = get_batch(tokens, batch_size, seq_len, "cpu", generator.manual_seed(run))
        b = batch_by_loop(mapped, batch_size, seq_len, generator.manual_seed(run))
        assert all(map(torch.equal, a, b))  # the same work; and the warm-up
        rounds = [(seconds(lambda: get_batch(tokens, batch_size, seq_len, "cpu", generator), 20),
                   seconds(lambda: batch_by_loop(mapped, batch_size, seq_len, generator), 20))
                  for _ in range(25)]  # in turn, so that a busy machine hits both alike
        for times, column in zip((ours, theirs), np.median(rounds, axis=0).tolist()):
            times.append(column)
    size = f"{batch_size}x{seq_len}"
    report(f"batches_per_second_{size}", [1 / t for t in ours], "batches per second")
    report(f"loop_batches_per_second_{size}", [1 / t for t in theirs], "batches per second")
    report(f"speedup_{size}", [b / a for a, b in zip(ours, theirs)], "ratio of rates")


def main() -> None:
    torch.set_num_threads(1)
    ids = np.random.default_rng(0).integers(0, Vocabulary.vocab_size, N_IDS).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path, peer_path = Path(folder) / "ids.bin", Path(folder) / "peer.bin"
        ours, theirs = [], []
        for _ in RUNS:
            theirs.append(seconds(lambda: np.array(ids, dtype=np.uint16).tofile(peer_path)))
            ours.append(seconds(lambda: TokenFile.write(path, ids, Vocabulary())))
        assert path.read_bytes()[64:] == peer_path.read_bytes()
        about = dict(peer="np.array(ids, dtype=np.uint16).tofile(path), without fsync",
                     source="a Python list of ids")
        report("write_million_ids_per_second", [N_IDS / 1e6 / t for t in ours], "million ids/s", **about)
        report("write_vs_numpy", [a / b for a, b in zip(ours, theirs)], "ratio of times", **about)
        for batch_size, seq_len in SIZES:
            measure_batches(path, batch_size, seq_len)


if __name__ == "__main__":
    main()
