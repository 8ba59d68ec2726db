"""Random batches from a token file beside the common row-by-row loop, and writing one, on one core.

    python benchmarks/data.py
"""
import tempfile
from pathlib import Path

import common
import numpy as np
import torch

from llm_book.data import TokenFile, get_batch

N_IDS = 10_000_000
BENCH = common.Bench("data", range(7), cores=1, n_ids=N_IDS)
SIZES = ((12, 1024), (64, 256))  # nanoGPT's train.py and config/train_shakespeare_char.py


class Vocabulary:
    """As much of a tokenizer as a token file needs."""

    vocab_size = 50_257

    def save(self, path):
        Path(path).write_text("benchmark")


def batch_by_loop(ids: np.memmap, batch_size: int, seq_len: int, generator: torch.Generator):
    """The peer: slice, widen and wrap each row by itself, then stack."""
    starts = torch.randint(len(ids) - seq_len, (batch_size,), generator=generator)
    x = torch.stack([torch.from_numpy(ids[s:s + seq_len].astype(np.int64)) for s in starts])
    y = torch.stack([torch.from_numpy(ids[s + 1:s + 1 + seq_len].astype(np.int64)) for s in starts])
    return x, y


def measure_batches(path: Path, batch_size: int, seq_len: int) -> None:
    """Both draw from the same file, which is in the page cache, each through its own map."""
    tokens, mapped, generator = TokenFile(path), np.memmap(path, "<u2", "r", offset=64), torch.Generator()
    calls = {"ours": lambda: get_batch(tokens, batch_size, seq_len, "cpu", generator),
             "loop": lambda: batch_by_loop(mapped, batch_size, seq_len, generator)}
    for seed in BENCH.runs:  # the same work
        batches = []
        for call in calls.values():
            generator.manual_seed(seed)
            batches.append(call())
        assert all(map(torch.equal, *batches))
    times = common.in_turns(calls, BENCH.runs, repeat=20, rounds=25)
    size = f"{batch_size}x{seq_len}"
    BENCH.report(f"batches_per_second_{size}", 1 / times["ours"], "batches per second")
    BENCH.report(f"loop_batches_per_second_{size}", 1 / times["loop"], "batches per second")
    BENCH.report(f"speedup_{size}", times["loop"] / times["ours"], "ratio of rates")


def main() -> None:
    common.one_core()
    ids = np.random.default_rng(0).integers(0, Vocabulary.vocab_size, N_IDS).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path, peer_path = Path(folder) / "ids.bin", Path(folder) / "peer.bin"
        times = common.in_turns(
            {"numpy": lambda: np.array(ids, dtype=np.uint16).tofile(peer_path),
             "ours": lambda: TokenFile.write(path, ids, Vocabulary())}, BENCH.runs, warm_up=0)
        assert path.read_bytes()[64:] == peer_path.read_bytes()
        about = dict(peer="np.array(ids, dtype=np.uint16).tofile(path), without fsync",
                     source="a Python list of ids")
        BENCH.report("write_million_ids_per_second", N_IDS / 1e6 / times["ours"], "million ids/s", **about)
        BENCH.report("write_vs_numpy", times["ours"] / times["numpy"], "ratio of times", **about)
        for batch_size, seq_len in SIZES:
            measure_batches(path, batch_size, seq_len)


if __name__ == "__main__":
    main()
