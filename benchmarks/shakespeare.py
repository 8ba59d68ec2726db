"""Shakespeare by characters on two cores: the well-known recipe beside chapter 15's, in one run.

The recipe is nanoGPT's for a CPU: 4 layers, 4 heads, width 128, context 64, batches of 12, 2,000
steps of AdamW, cosine from 1e-3 to 1e-4. Ours has no more parameters than its model, and reads the
same context of 64. The first 90 % of the characters are for training; a loss is the mean in nats
over the whole of the rest, in windows of 64. Seconds are wall time with all evaluations.

    python benchmarks/shakespeare.py --data tinyshakespeare.txt                    # all, recorded
    python benchmarks/shakespeare.py --data tinyshakespeare.txt --target 1.8857    # until it is there
    python benchmarks/shakespeare.py --data tinyshakespeare.txt --seconds 160      # for so long
    python benchmarks/shakespeare.py --data tinyshakespeare.txt --recipe           # the peer

Without --data nothing is measured: the text is not part of the project.
"""
import argparse
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

import common
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_book.gpt import GPT, GPTConfig
from llm_book.ngram import NGramLM
from llm_book.text import load_corpus
from llm_book.tokens import CharTokenizer
from llm_book.train import Run, TrainConfig, evaluate, train, update

COMMAND = "python benchmarks/shakespeare.py --data tinyshakespeare.txt"
T, TARGET, SEEDS, ATTEMPTS = 64, 1.8857, (0, 1, 2), 9
BENCH = common.Bench("shakespeare", SEEDS, COMMAND)
PEER = partial(GPTConfig, max_len=T, n_layers=4, d_model=128, n_heads=4, bias="none")


@dataclass(frozen=True)
class Recipe:
    """What ours is made of; each part can be taken away."""

    n_layers: int = 2
    d_model: int = 112
    batch_size: int = 24
    steps: int = 240
    positions: str = "rotary"
    norm: str = "rms"
    qk_norm: bool = True
    squared_relu: bool = True  # else GELU
    zero_init: bool = True  # of what writes into the stream, and of the head; else GPT-2's
    optimizer: str = "muon"
    max_lr: float = 1e-2
    muon_lr: float = 0.03
    weight_decay: float = 0.0
    schedule: str = "linear"
    precision: str = "bfloat16"


SHORT = Recipe()
LONG = Recipe(n_layers=3, d_model=128, max_lr=6e-3, muon_lr=0.02)
WITHOUT = {  # key: label, what changes
    "none": ("all of it", {}),
    "adamw": ("AdamW instead of Muon", {"optimizer": "adamw", "max_lr": 6e-3}),
    "learned": ("learned positions, not rotary", {"positions": "learned"}),
    "layernorm": ("layer norm, not RMS norm", {"norm": "layer"}),
    "no_qk_norm": ("queries and keys as they are", {"qk_norm": False}),
    "batch_12": ("batches of 12, not 24", {"batch_size": 12}),
    "4_layers": ("4 layers of 128, not 2 of 112", {"n_layers": 4, "d_model": 128}),
    "gelu": ("GELU, not squared ReLU", {"squared_relu": False}),
    "gpt2_init": ("GPT-2's first weights, tied", {"zero_init": False}),
    "cosine": ("cosine, not straight down", {"schedule": "cosine"}),
    "constant": ("a rate that stays", {"schedule": "constant"}),
    "float32": ("float32, not bfloat16", {"precision": "float32"}),
}


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """Source: So et al., Primer, 2021."""
    return functional.relu(x).square()


def make_model(recipe: Recipe, vocab_size: int) -> GPT:
    model = GPT(GPTConfig(vocab_size, T, recipe.n_layers, recipe.d_model, n_heads=4, bias="none",
                          positions=recipe.positions, norm=recipe.norm, qk_norm=recipe.qk_norm,
                          tied=not recipe.zero_init))
    for block in model.blocks:
        if recipe.squared_relu:
            block.feed_forward.activation = squared_relu
        if recipe.zero_init:
            bound = 0.6 * math.sqrt(3 / recipe.d_model)
            attention, up, down = block.attention, block.feed_forward.up, block.feed_forward.down
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj, up):
                nn.init.uniform_(layer.weight, -bound, bound)
            for layer in (attention.o_proj, down):
                nn.init.zeros_(layer.weight)
    if recipe.zero_init:
        nn.init.zeros_(model.head.weight)
    return model


def make_config(recipe: Recipe, steps: int, seed: int) -> TrainConfig:
    return TrainConfig(steps, recipe.batch_size, T, max_lr=recipe.max_lr, min_lr=0.0,
                       warmup_steps=min(10, steps - 1), schedule=recipe.schedule,
                       optimizer=recipe.optimizer, muon_lr=recipe.muon_lr, weight_decay=recipe.weight_decay,
                       betas=(0.8, 0.95), precision=recipe.precision, eval_every=steps, eval_windows=0,
                       seed=seed)


def attention(recipe: Recipe):
    """The backend that is faster in the recipe's precision, as a context.

    torch's fused attention on a CPU walks back through bfloat16 several times slower than the plain
    one. In float32 it is the faster one, which is what the peer gets.
    """
    return sdpa_kernel([SDPBackend.MATH] if recipe.precision == "bfloat16" else
                       [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])


def learn(recipe: Recipe, model: GPT, tokens: tuple, config: TrainConfig) -> float:
    """The loss on the whole of the validation part afterwards, in float32."""
    with attention(recipe):  # `train` itself has hardly anything to evaluate
        train(model, tokens[0], tokens[1][:T + 1], config, progress=False)
    return evaluate(model, tokens[1], T)


def to_target(recipe: Recipe, tokens: tuple, vocab_size: int, seed: int, target: float) -> tuple:
    """Loss and seconds of a run that ends at `target`, or goes on more slowly, up to nine times."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    model, slower = make_model(recipe, vocab_size), recipe
    loss = learn(recipe, model, tokens, make_config(recipe, recipe.steps, seed))
    for _ in range(ATTEMPTS):
        if loss <= target:
            break
        seed += 100  # other batches
        slower = replace(slower, max_lr=slower.max_lr / 2, muon_lr=slower.muon_lr / 2)
        loss = learn(slower, model, tokens, make_config(slower, recipe.steps // 3, seed))
    return loss, time.perf_counter() - started


def for_seconds(recipe: Recipe, tokens: tuple, vocab_size: int, seed: int, seconds: float) -> tuple:
    """Loss and seconds of a run whose learning rate comes down with the clock, not the steps."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    model, config = make_model(recipe, vocab_size), make_config(recipe, 1_000_000, seed)
    evaluate(model, tokens[1], T)
    limit = seconds - 1.5 * (time.perf_counter() - started)  # time for the evaluation at the end

    def left() -> float:
        """Share of the time."""
        return max(0.0, 1 - (time.perf_counter() - started) / max(limit, 1e-9))

    class ByTheClock(TrainConfig):
        def lr_share(self, step: int) -> float:
            return min((step + 1) / self.warmup_steps, left())

    run = Run(model, ByTheClock(**asdict(config)))
    with attention(recipe):
        while left():
            update(run, run.draw(run, tokens[0]))
    return evaluate(model, tokens[1], T), time.perf_counter() - started


def the_peer(tokens: tuple, vocab_size: int, seed: int) -> tuple:
    """Loss and seconds of nanoGPT's recipe, with its evaluations at every 250 steps."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    model = GPT(PEER(vocab_size))
    train(model, *tokens, TrainConfig(2_000, 12, T, max_lr=1e-3, min_lr=1e-4, warmup_steps=100,
                                      betas=(0.9, 0.99), weight_decay=0.1, eval_every=250,
                                      eval_windows=20 * 12, seed=seed), progress=False)
    return evaluate(model, tokens[1], T), time.perf_counter() - started


def write(key: str, values: list[float], unit: str, **context) -> None:
    BENCH.report(key, values, unit, median=statistics.median(values), threads=torch.get_num_threads(),
                 **context)


def side_by_side(tokens: tuple, vocab_size: int) -> None:
    """Recipe, ours to the target, and ours in the recipe's time, in turns."""
    runs = []
    for seed in SEEDS:
        recipe = the_peer(tokens, vocab_size, seed)
        target = to_target(SHORT, tokens, vocab_size, seed, TARGET)
        budget = for_seconds(LONG, tokens, vocab_size, seed, recipe[1])
        runs.append((*recipe, *target, *budget))
        print(f"seed {seed}: " + ", ".join(f"{value:.4f}" for value in runs[-1]), flush=True)
    loss, seconds, target_loss, target_seconds, budget_loss, budget_seconds = zip(*runs)
    write("recipe_loss", loss, "nats per character")
    write("recipe_seconds", seconds, "seconds")
    write("target_loss", target_loss, "nats per character", recipe=asdict(SHORT))
    write("target_seconds", target_seconds, "seconds")
    write("target_ratio", [a / b for a, b in zip(target_seconds, seconds)], "of the recipe's time")
    write("budget_loss", budget_loss, "nats per character", recipe=asdict(LONG))
    write("budget_seconds", budget_seconds, "seconds")
    write("budget_ratio", [a / b for a, b in zip(budget_seconds, seconds)], "of the recipe's time")
    for key, model in (("recipe", GPT(PEER(vocab_size))), ("target", make_model(SHORT, vocab_size)),
                       ("budget", make_model(LONG, vocab_size))):
        BENCH.report(f"{key}_parameters", sum(p.numel() for p in model.parameters()), "parameters")


def ablations(tokens: tuple, vocab_size: int) -> None:
    """One part taken away at a time, after the same number of steps."""
    for key, (label, change) in WITHOUT.items():
        recipe, losses, seconds = replace(SHORT, **change), [], []
        for seed in SEEDS:
            loss, wall = to_target(recipe, tokens, vocab_size, seed, math.inf)
            losses.append(loss), seconds.append(wall)
        write(f"ablation_{key}", losses, "nats per character", label=label, change=change,
              steps=SHORT.steps, seconds=statistics.median(seconds))


def counted(tokens: tuple, vocab_size: int) -> None:
    """The trivial baseline: chapter 3's best model, on the same split."""
    for order in range(3, 9):
        started = time.perf_counter()
        model = NGramLM(order, vocab_size, smoothing="kneser-ney").fit(tokens[0])
        seconds = time.perf_counter() - started
        loss = -model.log_prob(tokens[1]) / len(tokens[1])
        BENCH.report(f"kneser-ney_{order}", loss, "nats per character", order=order, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="tinyshakespeare.txt")
    parser.add_argument("--target", type=float, help="train until the loss is at most this")
    parser.add_argument("--seconds", type=float, help="train for so long")
    parser.add_argument("--recipe", action="store_true", help="train the peer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.data:
        print("skipped: name the file of Shakespeare's plays with --data")
        return
    torch.set_num_threads(2)
    text = load_corpus(args.data).text
    tokenizer = CharTokenizer(text)
    ids = np.array(tokenizer.encode(text), dtype=np.uint8)
    cut = len(ids) * 9 // 10
    run = (ids[:cut], ids[cut:]), tokenizer.vocab_size
    if args.recipe or args.target is not None or args.seconds is not None:
        loss, seconds = (the_peer(*run, args.seed) if args.recipe else
                         to_target(SHORT, *run, args.seed, args.target) if args.target is not None else
                         for_seconds(LONG, *run, args.seed, args.seconds))
        print(f"val_loss={loss:.4f} seconds={seconds:.1f}")
        return
    side_by_side(*run)
    ablations(*run)
    counted(*run)


if __name__ == "__main__":
    main()
