"""Our Transformer beside the same model made of torch.nn's layers, with the same weights, on one core.

A training step, and evaluation, where torch.nn takes a fast path of its own.

    python benchmarks/transformer.py
"""
import math
import time
import warnings
from collections.abc import Callable

import common
import torch
from torch import nn

from llm_book.positions import PositionalEncoding
from llm_book.transformer import Transformer

SHAPE = {"n_vocab": 1_000, "d_model": 128, "nhead": 4, "num_layers": 4, "dim_feedforward": 512}
BATCH, T, REPEAT = 8, 128, 10
BENCH = common.Bench("transformer", range(9), cores=1, batch=BATCH, length=T, dtype="float32",
                     repeats=REPEAT, **SHAPE)


class TorchTransformer(nn.Module):
    """The peer."""

    def __init__(self, n_vocab, d_model, nhead, num_layers, dim_feedforward, dropout):
        super().__init__()
        layer = nn.TransformerEncoderLayer(d_model, nhead, dim_feedforward, dropout, batch_first=True)
        self.encoder = nn.Embedding(n_vocab, d_model)
        self.pos_encoder = PositionalEncoding(d_model, dropout)
        self.transformer_encoder = nn.TransformerEncoder(layer, num_layers)
        self.fc_out = nn.Linear(d_model, n_vocab)

    def forward(self, src, src_mask=None, src_key_padding_mask=None):
        x = self.pos_encoder(self.encoder(src) * math.sqrt(self.encoder.embedding_dim))
        return self.fc_out(self.transformer_encoder(x, src_mask, src_key_padding_mask))


def training_step(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Callable[[], float]:
    """Logits, loss, gradients, SGD; with the causal mask."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> float:
        logits = model(ids[:, :-1], mask)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def evaluation(model: nn.Module, ids: torch.Tensor, padding: torch.Tensor | None) -> Callable:
    @torch.inference_mode()
    def forward() -> torch.Tensor:
        return model(ids, None, padding)

    return forward


def compare(name: str, ours: Callable, theirs: Callable, what: str) -> None:
    """CPU time of both: other work on the machine does not count. Record the ratio."""
    times = common.in_turns({"ours": ours, "theirs": theirs}, BENCH.runs, REPEAT, warm_up=2,
                            clock=time.process_time)
    BENCH.report(f"{name}_ms", 1e3 * times["ours"], "ms of CPU time", about=what)
    BENCH.report(f"{name}_vs_torch", times["ours"] / times["theirs"], "ratio of CPU times", about=what)


def main() -> None:
    common.one_core()
    warnings.simplefilter("ignore")  # nested tensors are a prototype, says torch
    torch.manual_seed(0)
    theirs, ours = TorchTransformer(**SHAPE, dropout=0.0), Transformer(**SHAPE, dropout=0.0)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(SHAPE["n_vocab"], (BATCH, T + 1))
    future = ~torch.ones(T, T, dtype=torch.bool).tril()

    ours.eval(), theirs.eval()
    ids_in = ids[:, :-1]
    lengths = torch.linspace(T / 8, T, BATCH).long()  # the mean is about half
    padding = torch.arange(T) >= lengths[:, None]
    for mask in (None, padding):  # both do the same work, but for what stands at padding
        real = slice(None) if mask is None else ~mask
        a, b = (evaluation(model, ids_in, mask)()[real] for model in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    compare("eval", *(evaluation(model, ids_in, None) for model in (ours, theirs)),
            "inference mode, no masks; torch.nn on its fast path")
    compare("eval_padded", *(evaluation(model, ids_in, padding) for model in (ours, theirs)),
            f"inference mode, {padding.float().mean():.0%} of the batch is padding, which the fast "
            "path of torch.nn leaves out")

    ours.train(), theirs.train()
    steps = [training_step(model, ids, future) for model in (ours, theirs)]
    for _ in range(3):  # equal weights stay equal
        a, b = (step() for step in steps)
        assert math.isclose(a, b, rel_tol=1e-4), (a, b)
    compare("step", *steps, "logits, loss, gradients, SGD, with a causal mask")


if __name__ == "__main__":
    main()
