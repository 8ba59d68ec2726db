"""The neural bigram and the MLP of chapter 9: two rungs of the ladder, and what a step costs.

Sizes and rates are chosen on the validation part; each seed is priced once on the test part.
Descent is timed beside counting, and a training step in NumPy beside PyTorch, on one core.

    python benchmarks/neural_lm.py
"""
import math
from collections.abc import Callable

import common
import numpy as np
import torch
from torch.nn import functional

from llm_book import tensor
from llm_book.lab import progress, seed_everything
from llm_book.neural_lm import MLPLM, BigramLM, fit, log_probs
from llm_book.ngram import NGramLM, count_ngrams
from llm_book.optim import adamw_step
from llm_book.text import load_corpus, split_text

SEEDS, RUNS = (0, 1, 2), range(5)
COMMAND = "python benchmarks/neural_lm.py"
BENCH = common.Bench("neural_lm", RUNS)
LADDER = common.Bench("ladder", SEEDS, COMMAND, corpus="python_docs", split="test part of split_text")
BIGRAM = dict(n_steps=1_000, batch_size=32, seq_len=64)
BIGRAM_CANDIDATES = [dict(max_lr=lr) for lr in (0.1, 0.3)]
SHORT, LONG = 200, 1_500  # steps, to choose and to keep
MLP = dict(batch_size=16, seq_len=64, weight_decay=0.1)
SIZES = [dict(context=context, d_embed=32, d_hidden=768) for context in (8, 12, 16)]
MLP_CANDIDATES = [(sizes, lr) for sizes in SIZES for lr in (4e-3, 8e-3)]
RULE = ("every byte of the text is predicted once, from the bytes before it that the model can read; "
        "the first, which has none, is charged 8 bits; the n-gram models give it their share of single bytes")


def bits(model: torch.nn.Module, ids: torch.Tensor) -> float:
    return -log_probs(model, ids).double().mean().item() / math.log(2)


def bigram(train: np.ndarray, seed: int, max_lr: float) -> BigramLM:
    model = BigramLM(256)
    for _ in fit(model, train, max_lr=max_lr, generator=torch.Generator().manual_seed(seed), **BIGRAM):
        pass
    return model


def mlp(train: np.ndarray, seed: int, n_steps: int, sizes: dict, max_lr: float,
        watch: Callable | None = None) -> MLPLM:
    seed_everything(seed)
    model, losses = MLPLM(256, **sizes), []
    steps = fit(model, train, n_steps=n_steps, max_lr=max_lr,
                generator=torch.Generator().manual_seed(seed), **MLP)
    for step, loss in enumerate(progress(steps, f"mlp {seed}", n_steps), 1):
        losses.append(loss / math.log(2))
        if watch and (step % 150 == 1 or step == n_steps):
            watch(step, float(np.mean(losses)), model)
            losses.clear()
    return model


def rungs(parts: list[np.ndarray]) -> None:
    train, validation, test = parts[0], *(torch.from_numpy(p.astype(np.int64)) for p in parts[1:])
    counted = NGramLM(2, 256).fit(train)
    BENCH.report("counted_bigram", -counted.log_prob(parts[2]) / len(test) / math.log(2),
                 "bits per byte", smoothing="kneser-ney", order=2, corpus="python_docs",
                 split="test part of split_text")
    about = dict(test_bytes=len(test), rule=RULE)

    scores = [bits(bigram(train, 0, **options), validation) for options in BIGRAM_CANDIDATES]
    options = BIGRAM_CANDIDATES[int(np.argmin(scores))]
    LADDER.report("neural-bigram", [bits(bigram(train, seed, **options), test) for seed in SEEDS],
                  "bits per byte", label="neural bigram", validation=min(scores),
                  options={**BIGRAM, **options}, candidates=len(scores), parameters=256 * 256, **about)

    scores = [bits(mlp(train, 0, SHORT, *choice), validation[:50_000]) for choice in MLP_CANDIDATES]
    for choice, score in zip(MLP_CANDIDATES, scores):
        print(f"{score:.4f} after {SHORT} steps {choice}", flush=True)
    sizes, max_lr = MLP_CANDIDATES[int(np.argmin(scores))]
    curve = []

    def watch(step: int, loss: float, model: MLPLM) -> None:
        curve.append([step, loss, bits(model, validation[:50_000])])

    models = [mlp(train, seed, LONG, sizes, max_lr, watch if seed == SEEDS[0] else None)
              for seed in SEEDS]
    held_out = [bits(model, validation) for model in models]
    LADDER.report("mlp", [bits(model, test) for model in models], "bits per byte",
                  label=f"MLP, {sizes['context']} bytes", validation=float(np.mean(held_out)),
                  options={**sizes, **MLP, "max_lr": max_lr, "n_steps": LONG}, candidates=len(scores),
                  parameters=sum(p.numel() for p in models[0].parameters()), **about)
    BENCH.report("mlp_curve", curve[-1][2], "bits per byte", SEEDS[:1], curve=curve,
                 columns=["step", "training, mean since the row before",
                          "validation, first 50,000 bytes"])


def numpy_step(n: int, D: int, F: int, state: dict) -> Callable:
    E, H, b, U, c = parameters = [tensor.Tensor(p.numpy().copy(), requires_grad=True)
                                  for p in state.values()]
    memory = [(np.zeros_like(p.data), np.zeros_like(p.data)) for p in parameters]
    count = iter(range(1, 1_000_000))

    def step(rows: np.ndarray) -> float:
        h = (E[rows[:, :-1]].reshape(len(rows), n * D) @ H.T + b).tanh()
        loss = tensor.cross_entropy(h @ U.T + c, rows[:, -1])
        loss.backward()
        t = next(count)
        for p, (mean, square) in zip(parameters, memory):
            adamw_step(p.data, p.grad, mean, square, t, lr=1e-3)
            p.grad = None
        return loss.item()

    return step


def torch_step(n: int, D: int, F: int, state: dict, optimizer_class: type) -> Callable:
    E, H, b, U, c = parameters = [p.clone().requires_grad_() for p in state.values()]
    optimizer = optimizer_class(parameters, lr=1e-3, weight_decay=0.0)

    def step(rows: np.ndarray) -> float:
        rows = torch.from_numpy(rows)
        x = functional.embedding(rows[:, :-1], E).reshape(len(rows), n * D)
        loss = functional.cross_entropy(functional.linear(functional.linear(x, H, b).tanh(), U, c), rows[:, -1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def all_steps(step: Callable, batches: list) -> list[float]:
    return [step(rows) for rows in batches]


def costs(train: np.ndarray) -> None:
    sizes = 8, 16, 192
    model = MLPLM(256, *sizes, generator=torch.Generator().manual_seed(0))
    state = {name: p.detach() for name, p in model.state_dict().items()}
    rng = np.random.default_rng(0)
    batches = [train[rng.integers(0, len(train) - 9, 256)[:, None] + np.arange(9)].astype(np.int64)
               for _ in range(100)]
    ours, peer = numpy_step(*sizes, state), torch_step(*sizes, state, torch.optim.AdamW)
    np.testing.assert_allclose(all_steps(ours, batches[:20]), all_steps(peer, batches[:20]), rtol=1e-3)
    times = common.in_turns({"ours": lambda: all_steps(ours, batches),
                             "torch": lambda: all_steps(peer, batches)}, RUNS, warm_up=0)
    BENCH.report("step_vs_torch", times["ours"] / times["torch"], "ratio of times", cores=1,
                 peer="torch.nn.functional, torch.optim.AdamW",
                 network="8 bytes, 16 numbers each, 192 hidden, batch 256, float32")
    times = common.in_turns({"descent": lambda: bigram(train, 0, 0.3),
                             "counting": lambda: count_ngrams(train, 2, 256)}, RUNS, warm_up=0)
    BENCH.report("descent_vs_counting", times["descent"] / times["counting"], "ratio of times", cores=1,
                 work=f"fit of BigramLM, {BIGRAM}, beside count_ngrams of order 2 on the same training "
                 "text")


def main() -> None:
    torch.set_num_threads(1)  # on a busy machine two wait for each other
    parts = [np.frombuffer(part.encode(), np.uint8) for part in split_text(load_corpus("python_docs").text)]
    rungs(parts)
    costs(parts[0])


if __name__ == "__main__":
    main()
