"""One step of each optimizer on ten million parameters, beside torch's own, on one core.

The tensors are those of a small GPT: an embedding of 4,096 × 320 and seven blocks of width 320.

    python benchmarks/optim.py
"""
import math

import common
import torch

from llm_book import optim

BENCH, STEPS = common.Bench("optim", range(9), cores=1), 5
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


def main() -> None:
    common.one_core()
    torch.zeros(30 * 2**18)  # 30 MB come and go, as in training; after that glibc keeps memory, and
    # torch's foreach gets its temporaries without page faults (they take half its time otherwise)
    for name, (make_ours, make_theirs, shapes) in PAIRS.items():
        sets = parameters(shapes), parameters(shapes)
        calls = {"ours": make_ours(sets[0]).step, "torch": make_theirs(sets[1]).step}
        for step in calls.values():
            common.seconds(step, STEPS)  # warm-up; both do the same work
        atol = 5e-5 if name.startswith("muon") else 1e-6  # its moves are rounded to bfloat16
        torch.testing.assert_close(*sets, rtol=0, atol=atol)
        times = common.in_turns(calls, BENCH.runs, repeat=STEPS, warm_up=0)
        context = {"steps": STEPS, "n_parameters": sum(map(math.prod, shapes)), "n_tensors": len(shapes)}
        BENCH.report(name, times["ours"] / times["torch"], "ratio of times", **context)
        if name == "adamw":
            BENCH.report("adamw_step_ms", 1e3 * times["ours"], "ms", **context)
            BENCH.report("adamw_step_ms_torch", 1e3 * times["torch"], "ms", **context)


if __name__ == "__main__":
    main()
