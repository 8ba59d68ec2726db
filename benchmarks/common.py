"""What the benchmarks share: threads, times taken in turns, and records in the ledger.

A script imports this module before NumPy and torch, which count their threads when they are loaded:

    import common

    bench = common.Bench("optim", runs=range(9), cores=1)
    common.one_core()
    times = common.in_turns({"ours": ours, "torch": theirs}, bench.runs, repeat=5)
    bench.report("adamw", times["ours"] / times["torch"], "ratio of times")
"""
import os

os.environ.update(dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"),
    TOKENIZERS_PARALLELISM="false")  # torch.set_num_threads gives torch more

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from llm_book.lab import record


def one_core() -> None:
    """Keep this process on one core, with one thread."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def seconds(
    work: Callable,
    repeat: int = 1,  # how often it is called
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The mean time of a call."""
    start = clock()
    for _ in range(repeat):
        work()
    return (clock() - start) / repeat


def in_turns(
    calls: dict[str, Callable],
    runs: Sequence,  # each gives one number for each call
    repeat: int = 1,  # calls that are timed together
    rounds: int = 1,  # times in a run, of which `best` keeps one number
    best: Callable = np.median,  # min, where other programs can only add
    warm_up: int | None = None,  # calls before the first; default `repeat`
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Seconds of each call in every run.

    The calls take turns, in an order that is reversed each time, so that whatever else the machine
    does meets all of them alike, and a ratio of two of them means something.
    """
    for work in calls.values():
        for _ in range(repeat if warm_up is None else warm_up):
            work()
    names, found = list(calls), []
    for _ in runs:
        times = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                times[name].append(seconds(calls[name], repeat, clock))
            names.reverse()
        found.append([best(times[name]) for name in calls])
    return dict(zip(calls, np.array(found, dtype=float).reshape(-1, len(calls)).T))


class Bench:
    """One file of the ledger, and what all its records have in common."""

    def __init__(
        self,
        file: str,  # of the ledger
        runs: Sequence[int] = (),  # numbers or seeds of the runs, where a record does not name its own
        command: str | None = None,  # default: the script of that name
        **context,
    ):
        self.file, self.runs, self.context = file, list(runs), context
        self.command, self.machine_named = command or f"python benchmarks/{file}.py", False

    def report(
        self,
        key: str,
        values: float | Sequence[float],
        unit: str,
        seeds: Sequence[int] | None = None,  # default: the runs, if there are several values
        **context,
    ) -> dict:
        """Record and print one number, or one for each run with mean, spread and median."""
        if seeds is None:
            seeds = self.runs if np.ndim(values) else ()
        entry = record(f"{self.file}/{key}", np.asarray(values, dtype=float).tolist(), unit,
                       seeds=list(seeds), command=self.command, **self.context, **context)
        if not self.machine_named:
            self.name_machine(entry)
        if entry["sd"] is None:
            print(f"{key}: {entry['value']:,.6g} {unit}", flush=True)
        else:
            print(f"{key}: {entry['value']:.4g} ± {entry['sd']:.2g}, median {np.median(values):.4g} {unit}",
                  flush=True)
        return entry

    def name_machine(self, entry: dict) -> None:
        """Print where the numbers come from, as the ledger has it, and how busy the machine is."""
        machine, versions = entry["hardware"], entry["versions"]
        load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        print(f"# {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, threads of torch: "
              f"{torch.get_num_threads()}{load}; Python {versions['python']}, torch {versions['torch']}, "
              f"commit {entry['commit']}", flush=True)
        self.machine_named = True
