"""What communication costs: two processes on one machine, over gloo, or over NCCL with two GPUs.

All-reduce: seconds for sizes from 64 bytes to 16 MiB, the median of many in each round, and the
alpha and beta that fit them, round by round. Ring: chapter 17's ring_all_reduce over
dist.all_reduce, in turns. Steps: the same global batch on one process (the other waits) and on two,
with DDP and with FSDP, in turns; the ratio is 2 for a perfect division of labour.

    python benchmarks/distributed.py
"""
import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from llm_book.distributed import accumulate_ranks, ring_all_reduce, setup, wrap
from llm_book.gpt import GPT, GPTConfig
from llm_book.lab import record
from llm_book.optim import AdamW
from llm_book.train import accumulate

COMMAND, ROUNDS = "python benchmarks/distributed.py", range(7)
SIZES = [4**k for k in range(3, 13)]  # bytes
SHAPE = dict(vocab_size=256, max_len=128, n_layers=4, d_model=128, n_heads=4)
ROWS, STEPS = 16, 4  # of the global batch; steps of each kind in a round


def seconds(work: Callable, device: torch.device) -> float:
    """Time of `work` from a common start until the slowest rank is through."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = torch.tensor(time.perf_counter() - start, device=device)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def all_reduces(device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Medians for each round and size: of dist.all_reduce, and of the ring by hand."""
    found = []
    for _ in ROUNDS:
        rows = []
        for size in SIZES:
            array = torch.ones(size // 4, device=device)
            times = max(5, min(100, 2**22 // size))
            pairs = [[seconds(partial(add, array), device) for add in (dist.all_reduce, ring_all_reduce)]
                     for _ in range(times)]
            rows.append(np.median(pairs, axis=0))
        found.append(rows)
    return np.moveaxis(np.array(found), 2, 0)


def rivals(place) -> dict[str, Callable]:
    """A training step in each layout, by the same weights and the same global batch."""
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**SHAPE)).to(place.device)
    ids = torch.randint(256, (ROWS, SHAPE["max_len"] + 1), device=place.device)
    whole, mine = [(ids[:, :-1], ids[:, 1:])], [(ids[place.rank::2, :-1], ids[place.rank::2, 1:])]

    def step_of(model, optimizer, add: Callable, batches: list) -> Callable:
        def step() -> float:
            optimizer.zero_grad()
            loss = add(model, batches)
            optimizer.step()
            return loss
        return step

    steps = {}
    for mode in ("ddp", "fsdp"):
        model = wrap(copy.deepcopy(plain), mode)
        steps[mode] = step_of(model, AdamW(model.parameters(), lr=1e-3), accumulate_ranks, mine)
    alone = step_of(plain, AdamW(plain.parameters(), lr=1e-3), accumulate, whole)
    losses = [[step() for _ in range(3)] for step in (alone, *steps.values())]
    np.testing.assert_allclose(losses, losses[:1] * 3, rtol=1e-4)
    return {"alone": (lambda: alone() if place.rank == 0 else None), **steps}


def work() -> None:
    torch.set_num_threads(1)
    place = setup()
    times, by_hand = all_reduces(place.device)
    steps = rivals(place)
    took = {name: [] for name in steps}
    for _ in ROUNDS:
        turns = [[seconds(step, place.device) for step in steps.values()] for _ in range(STEPS)]
        for name, median in zip(steps, np.median(turns, axis=0)):
            took[name].append(median)
    if place.rank == 0:
        keep(dist.get_backend(), times, by_hand, {name: np.array(t) for name, t in took.items()})
    dist.destroy_process_group()


def fit_alpha_beta(
    n_bytes: Sequence[float],  # sizes of at least two kinds
    seconds: Sequence[float],  # that an all-reduce of each took
    world_size: int,
) -> tuple[float, float]:
    """The alpha and beta of `all_reduce_seconds` for a ring that come closest, in relative terms."""
    sizes, took = np.asarray(n_bytes, float), np.asarray(seconds, float)
    messages = 2 * (world_size - 1)
    rows = np.stack([np.full_like(sizes, messages), messages / world_size * sizes], 1)
    alpha, beta = np.linalg.lstsq(rows / took[:, None], np.ones_like(took), rcond=None)[0]
    return float(alpha), float(beta)


def keep(backend: str, times: np.ndarray, by_hand: np.ndarray, took: dict) -> None:
    context = dict(command=COMMAND, seeds=list(ROUNDS), processes=2, threads_each=1, backend=backend)
    for size, column in zip(SIZES, times.T):
        record(f"distributed/{backend}_all_reduce_{size}", column, "seconds", n_bytes=size, **context)
    alphas, betas = np.array([fit_alpha_beta(SIZES, row, 2) for row in times]).T
    large = [size >= 2**20 for size in SIZES]
    entries = {
        "alpha": record(f"distributed/{backend}_alpha", alphas * 1e6, "µs", **context),
        "beta": record(f"distributed/{backend}_beta", betas * 1e9, "ms per MB", **context),
        "ring": record(f"distributed/{backend}_ring_ratio", np.median(by_hand / times, axis=1),
                       "times dist.all_reduce's time", **context, sizes=SIZES,
                       from_1_mib=float(np.median((by_hand / times)[:, large]))),
        "alone": record(f"distributed/{backend}_step_alone", took["alone"], "seconds",
                        rows=ROWS, **context, **SHAPE)}
    for mode in ("ddp", "fsdp"):
        entries[mode] = record(f"distributed/{backend}_step_ratio_{mode}", took["alone"] / took[mode],
                               "times the steps per second of one process", rows=ROWS, **context,
                               **SHAPE)
    for name, entry in entries.items():
        print(f"{name:6} {entry['value']:.4g} ± {entry['sd']:.2g} {entry['unit']}", flush=True)


def main() -> None:
    if "RANK" in os.environ:
        work()
        return
    hidden = {} if torch.cuda.device_count() > 1 else {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                    "2", __file__], check=True, env={"OMP_NUM_THREADS": "1", **os.environ, **hidden})


if __name__ == "__main__":
    main()
