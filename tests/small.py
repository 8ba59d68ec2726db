"""Small models, tokens and settings that several test files share."""
import numpy as np
import torch

from llm_book.gpt import GPT, GPTConfig
from llm_book.neural_lm import MLPLM
from llm_book.train import TrainConfig, accumulate, make_optimizers

TOKENS = np.random.default_rng(0).integers(0, 11, 600)


def gpt(dropout=0.0, seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=11, max_len=16, n_layers=1, d_model=8, n_heads=2, dropout=dropout)
    return GPT(GPTConfig(**{**shape, **changes}))


def mlp(**changes):
    return MLPLM(**{**dict(vocab_size=11, context=3, d_embed=4, d_hidden=8), **changes},
                 generator=torch.Generator().manual_seed(0))


def config(**changes):
    small = dict(max_steps=6, batch_size=2, seq_len=8, warmup_steps=2, checkpoint_every=2,
                 eval_every=3, eval_windows=4, max_lr=1e-2, min_lr=1e-3)
    return TrainConfig(**{**small, **changes})


def without_speed(history):
    return [{key: value for key, value in entry.items() if key != "tokens_per_second"}
            for entry in history]


def trained(optimizer="muon", steps=3):
    """A model and its optimizers after a few steps."""
    model = gpt()
    optimizers = make_optimizers(model, config(optimizer=optimizer))
    for _ in range(steps):
        accumulate(model, [(torch.from_numpy(TOKENS[None, :8]), torch.from_numpy(TOKENS[None, 1:9]))])
        for one in optimizers:
            one.step()
    return model, optimizers


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Killed(BaseException):
    """As good as SIGKILL for the files: nobody catches it."""
