"""One training step of an MLP, beside torch and beside the scalar engine of chapter 5, on one core.

784 → 256 → 10, batch 64, float32: scores, cross-entropy, backward, plain gradient descent.

    python benchmarks/tensor.py
"""
import tracemalloc
from collections.abc import Callable

import common
import numpy as np
import torch

from llm_book.autograd import Value
from llm_book.tensor import Tensor, cross_entropy

BENCH = common.Bench("tensor", range(9), cores=1, network="784-256-10, batch 64, float32")
STEPS, LR = 200, 0.1
BATCH, INPUTS, HIDDEN, CLASSES = 64, 784, 256, 10
SMALL = 8, 32, 16, 10  # the same four for the scalar engine


def multiplications(batch: int, inputs: int, hidden: int, classes: int) -> int:
    return batch * (inputs * hidden + hidden * classes)


def problem(batch: int, inputs: int, hidden: int, classes: int) -> tuple[list, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(np.float32) / np.float32(shape[0] ** 0.5)
               for shape in ((inputs, hidden), (hidden, classes))]
    parameters = [weights[0], np.zeros(hidden, np.float32), weights[1], np.zeros(classes, np.float32)]
    images = rng.standard_normal((batch, inputs)).astype(np.float32)
    return parameters, images, rng.integers(0, classes, batch)


def our_step(parameters: list, images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    W, b, U, c = parameters = [Tensor(p.copy(), requires_grad=True) for p in parameters]

    def step() -> float:
        loss = cross_entropy((images @ W + b).relu() @ U + c, labels)
        loss.backward()
        for p in parameters:
            p.data -= LR * p.grad
            p.grad = None
        return loss.item()

    return step


def torch_step(parameters: list, images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    W, b, U, c = parameters = [torch.tensor(p, requires_grad=True) for p in parameters]
    images, labels = torch.tensor(images), torch.tensor(labels)
    optimizer = torch.optim.SGD(parameters, lr=LR)

    def step() -> float:
        loss = torch.nn.functional.cross_entropy((images @ W + b).relu() @ U + c, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def scalar_step(parameters: list, images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    W, b, U, c = ([[Value(float(v)) for v in row] for row in np.atleast_2d(p)] for p in parameters)
    leaves = [v for matrix in (W, b, U, c) for row in matrix for v in row]

    def layer(xs, W, b):
        return [sum((x * row[j] for x, row in zip(xs, W)), bias) for j, bias in enumerate(b[0])]

    def step() -> float:
        loss = 0
        for image, label in zip(images.tolist(), labels):
            scores = layer([h.relu() for h in layer(image, W, b)], U, c)
            loss = loss + sum((s.exp() for s in scores), Value(0.0)).log() - scores[label]
        loss = loss / len(labels)
        loss.backward()
        for v in leaves:
            v.data -= LR * v.grad
            v.grad = 0.0
        return loss.data

    return step


def products(parameters: list, images: np.ndarray) -> Callable[[], None]:
    """Nothing but the five matrix products of a step."""
    W, _, U, _ = parameters
    hidden, scores = images @ W, images @ W @ U

    def multiply() -> None:
        images @ W, hidden @ U
        hidden.T @ scores, scores @ U.T, images.T @ hidden

    return multiply


def our_peak(step: Callable) -> float:
    """MB that one step takes at its peak, by NumPy's and Python's own account."""
    tracemalloc.start()
    step()  # what stays after a step is not counted
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    step()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return peak / 1e6


def torch_peak(step: Callable) -> float:
    """The same for torch's allocator, from the profiler's record of every allocation."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return float(np.cumsum(changes).max()) / 1e6


def main() -> None:
    common.one_core()
    large, small = problem(BATCH, INPUTS, HIDDEN, CLASSES), problem(*SMALL)
    for peer, data in ((torch_step, large), (scalar_step, small)):  # all three do the same work
        ours, theirs = our_step(*data), peer(*data)
        np.testing.assert_allclose([ours() for _ in range(5)], [theirs() for _ in range(5)], rtol=1e-4)

    steps = {"ours": our_step(*large), "torch": torch_step(*large), "products": products(*large[:2])}
    times = common.in_turns(steps, BENCH.runs, repeat=STEPS)
    factor = multiplications(BATCH, INPUTS, HIDDEN, CLASSES) / multiplications(*SMALL)
    times |= common.in_turns({"scalar": scalar_step(*small)}, BENCH.runs, repeat=3, warm_up=0)

    BENCH.report("step_ms", 1e3 * times["ours"], "ms", steps=STEPS)
    BENCH.report("step_vs_torch", times["ours"] / times["torch"], "ratio of times", steps=STEPS)
    BENCH.report("products_share", times["products"] / times["ours"], "share of the step")
    BENCH.report(
        "scalar_vs_step", factor * times["scalar"] / times["ours"], "ratio of times",
        scaled=f"scalar engine timed on a {SMALL[1]}-{SMALL[2]}-{SMALL[3]} network, batch {SMALL[0]}, "
               f"and scaled by the number of multiplications, {factor:,.0f}")
    BENCH.report("peak_mb", our_peak(steps["ours"]), "MB",
                 about="beyond weights and images; tracemalloc, without the buffers of the BLAS library")
    BENCH.report("peak_mb_torch", torch_peak(steps["torch"]), "MB",
                 about="beyond weights and images; torch.profiler, without the buffers of the BLAS library")


if __name__ == "__main__":
    main()
