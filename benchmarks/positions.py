"""Rotary embedding beside transformers' own, on one core; and five schemes beyond the trained length.

    python benchmarks/positions.py
"""
import math

import common
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llm_book.attention import MultiHeadAttention
from llm_book.data import get_batch
from llm_book.optim import AdamW, cosine_schedule
from llm_book.positions import LearnedPositions, PositionalEncoding, RotaryEmbedding, alibi_bias
from llm_book.text import load_corpus, split_text

BENCH = common.Bench("positions", range(9))
SHAPES = {(4, 8, 512, 64): 40, (1, 12, 1, 64): 2_000}  # (B, H, T, K): calls in a run
SEEDS, STEPS, TRAINED, READ = range(3), 1_200, 32, 128


def time_rotary(shape: tuple[int, int, int, int], calls: int) -> None:
    """Queries and keys turned, ours with lookup and check, theirs with tables at hand."""
    B, H, T, K = shape
    q, k = torch.randn(2, *shape)
    positions = torch.arange(1024 - T, 1024)
    config = LlamaConfig(hidden_size=H * K, num_attention_heads=H, max_position_embeddings=1024)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    rope = RotaryEmbedding(K, 1024)

    def ours() -> tuple:
        return rope(q, positions), rope(k, positions)

    def theirs() -> tuple:
        return apply_rotary_pos_emb(q, k, cos, sin)

    for a, b in zip(ours(), theirs()):
        torch.testing.assert_close(a, b, atol=0, rtol=0)  # the same work, to the last bit
    times = common.in_turns({"ours": ours, "theirs": theirs}, BENCH.runs, repeat=calls)
    name = "x".join(map(str, shape))
    context = {"cores": 1, "shape": list(shape), "dtype": "float32",
               "peer": f"transformers {transformers.__version__} apply_rotary_pos_emb"}
    BENCH.report(f"rotary_us_{name}", 1e6 * times["ours"], "microseconds for q and k", **context)
    BENCH.report(f"rotary_vs_hf_{name}", times["ours"] / times["theirs"], "ratio of times", **context)


class OneLayer(nn.Module):
    """The model of the page."""

    def __init__(self, add=None, rope=None, bias=None):
        super().__init__()
        self.embedding, self.add, self.bias = nn.Embedding(256, 64), add or nn.Identity(), bias
        self.norm, self.attention = nn.LayerNorm(64), MultiHeadAttention(64, 4, rope=rope)
        self.network = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.head = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256))

    def forward(self, ids):
        x = self.add(self.embedding(ids))
        mask = self.bias(4, ids.shape[1])[None] if self.bias else None
        x = x + self.attention(self.norm(x), mask=mask, causal=True)
        return self.head(x + self.network(x))


SCHEMES = {
    "none": lambda: {}, "learned": lambda: {"add": LearnedPositions(TRAINED, 64)},
    "sinusoidal": lambda: {"add": PositionalEncoding(64, 0.0, READ)},
    "rotary": lambda: {"rope": RotaryEmbedding(16, READ)}, "alibi": lambda: {"bias": alibi_bias},
}


def bits_by_place(name: str, seed: int, train: np.ndarray, validation: np.ndarray) -> np.ndarray:
    """Train on short rows, read long ones; bits per byte at each place."""
    torch.manual_seed(seed)
    model, generator = OneLayer(**SCHEMES[name]()), torch.Generator().manual_seed(seed)
    optimizer = AdamW(model.parameters(), betas=(0.9, 0.98))
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = cosine_schedule(step, 5e-3, 0.0, 40, STEPS)
        x, y = get_batch(train, 16, TRAINED, "cpu", generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    reach = TRAINED if name == "learned" else READ
    x, y = get_batch(validation, 1024, READ, "cpu", torch.Generator().manual_seed(0))
    with torch.no_grad():
        nats = F.cross_entropy(model.eval()(x[:, :reach]).mT, y[:, :reach], reduction="none")
    return nats.mean(0).numpy() / math.log(2)


def extrapolate() -> None:
    parts = split_text(load_corpus("python_docs").text)[:2]
    train, validation = (np.frombuffer(part.encode(), np.uint8) for part in parts)
    context = {"steps": STEPS, "trained_places": TRAINED, "corpus": "python_docs", "layers": 1}
    for name in SCHEMES:
        bits = [bits_by_place(name, seed, train, validation) for seed in SEEDS]
        BENCH.report(f"{name}_inside", [b[:TRAINED].mean() for b in bits], "bits per byte", SEEDS,
                     places=f"0 to {TRAINED - 1}", **context)
        if name != "learned":
            BENCH.report(f"{name}_beyond", [b[READ - 32:].mean() for b in bits], "bits per byte", SEEDS,
                         places=f"{READ - 32} to {READ - 1}", **context)


if __name__ == "__main__":
    common.one_core()
    for shape, calls in SHAPES.items():
        time_rotary(shape, calls)
    extrapolate()
