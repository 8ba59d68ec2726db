"""One step of each optimizer on ten million parameters, beside torch's own, on one core.

The tensors are those of a small GPT: an embedding of 4,096 × 320 and seven blocks of width 320.

    python benchmarks/optim.py
"""
import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import math
import time

import torch

from llm_book import optim
from llm_book.lab import record

RUNS, STEPS = range(9), 5
COMMAND = "python benchmarks/optim.py"
D = 320
BLOCK = [(3 * D, D), (3 * D,), (D, D), (D,), (4 * D, D), (4 * D,), (D, 4 * D), (D,), *[(D,)] * 4]
SHAPES = [(4096, D)] + 7 * BLOCK
MATRICES = [shape for shape in BLOCK if len(shape) == 2]  # Muon: one block is enough
SMALL = 4 * (4 * [(128, 128)] + [(512, 128), (128, 512)])  # four blocks of chapter 14's
PAIRS = {  # name: ours, torch's, shapes
    "adamw": (lambda ps: optim.AdamW(ps), lambda ps: torch.optim.AdamW(ps, foreach=True), SHAPES),
    "adamw_fused": (lambda ps: optim.AdamW(ps), lambda ps: torch.optim.AdamW(ps, fused=True), SHAPES),
    "adam": (lambda ps: optim.Adam(ps), lambda ps: torch.optim.Adam(ps, foreach=True), SHAPES),
    "rmsprop": (lambda ps: optim.RMSProp(ps),
                lambda ps: torch.optim.RMSprop(ps, foreach=True), SHAPES),
    "sgd": (lambda ps: optim.SGD(ps, momentum=0.9),
            lambda ps: torch.optim.SGD(ps, momentum=0.9, foreach=True), SHAPES),
    "muon": (lambda ps: optim.Muon(ps), lambda ps: torch.optim.Muon(ps), MATRICES),
    "muon_small": (lambda ps: optim.Muon(ps), lambda ps: torch.optim.Muon(ps), SMALL),
}


def parameters(shapes: list) -> list[torch.Tensor]:
    """The same numbers and gradients at each call."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        p = (0.02 * torch.randn(shape, generator=generator)).requires_grad_()
        p.grad = 0.01 * torch.randn(shape, generator=generator)
        made.append(p)
    return made


def milliseconds(optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        optimizer.step()
    return 1e3 * (time.perf_counter() - start) / STEPS


def main() -> None:
    torch.set_num_threads(1)
    torch.zeros(30 * 2**18)  # 30 MB come and go, as in training; after that glibc keeps memory, and
    # torch's foreach gets its temporaries without page faults (they take half its time otherwise)
    for name, (make_ours, make_theirs, shapes) in PAIRS.items():
        sets = parameters(shapes), parameters(shapes)
        ours, theirs = make_ours(sets[0]), make_theirs(sets[1])
        milliseconds(ours), milliseconds(theirs)  # warm-up; both have done the same work
        atol = 5e-5 if name.startswith("muon") else 1e-6  # its moves are rounded to bfloat16
        torch.testing.assert_close(*sets, rtol=0, atol=atol)
        times = [(milliseconds(ours), milliseconds(theirs)) for _ in RUNS]
        context = {"seeds": list(RUNS), "command": COMMAND, "cores": 1, "steps": STEPS,
                   "n_parameters": sum(map(math.prod, shapes)), "n_tensors": len(shapes)}
        rows = [(name, [a / b for a, b in times], "ratio of times")]
        if name == "adamw":
            rows += [("adamw_step_ms", [a for a, _ in times], "ms"),
                     ("adamw_step_ms_torch", [b for _, b in times], "ms")]
        for key, values, unit in rows:
            entry = record(f"optim/{key}", values, unit, **context)
            print(f"{key}: {entry['value']:.3g} ± {entry['sd']:.2g} {unit}")


if __name__ == "__main__":
    main()
