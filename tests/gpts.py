"""Small random models of ours and of transformers, for the tests of `gpt` and `hub`."""
import os
import subprocess
import sys

import torch
from conftest import ROOT
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from llm_book.gpt import GPT, GPTConfig

logging.set_verbosity_error()
logging.disable_progress_bar()

GPT2 = dict(vocab_size=65, max_len=24, n_layers=2, d_model=24, n_heads=4)
LLAMA = dict(GPT2, n_kv_heads=2, positions="rotary", norm="rms", feed_forward="swiglu", bias="none", tied=False)
SHAPES = {
    "gpt2": GPT2, "gpt2, untied": dict(GPT2, tied=False), "gpt2, d_ff": dict(GPT2, d_ff=40, n_heads=3),
    "llama": LLAMA, "llama, tied, one kv head": dict(LLAMA, tied=True, n_kv_heads=1),
    "llama, all heads, theta": dict(LLAMA, n_kv_heads=4, rope_theta=500_000.0, head_dim=10),
    "qwen2": dict(LLAMA, bias="qkv", norm_eps=1e-6), "qwen2, tied": dict(LLAMA, bias="qkv", tied=True),
    "qwen3": dict(LLAMA, qk_norm=True, head_dim=8), "qwen3, tied": dict(LLAMA, qk_norm=True, tied=True),
    "none, other heads": dict(GPT2, head_dim=5), "none, grouped": dict(GPT2, n_kv_heads=2),
    "none, squared ReLU": dict(GPT2, feed_forward="relu2", init="zero", positions="rotary"),
    "none, mixed": dict(LLAMA, positions="learned", feed_forward="gelu", qk_norm=True),
}
CLASSES = {"gpt2": (GPT2Config, GPT2LMHeadModel), "llama": (LlamaConfig, LlamaForCausalLM),
           "qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
SMALL = {"gpt2": dict(vocab_size=65, n_positions=24, n_embd=24, n_layer=2, n_head=4)} | {
    name: dict(vocab_size=65, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=4, max_position_embeddings=24, intermediate_size=40)
    for name in ("llama", "qwen2", "qwen3")}


def disturbed(model: torch.nn.Module) -> torch.nn.Module:
    """No weight keeps the value that initialisation gave it, so that each one counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def random_model(seed=0, **options) -> GPT:
    torch.manual_seed(seed)
    return disturbed(GPT(GPTConfig(**options)))


def theirs(name, **options):
    """A model of transformers."""
    torch.manual_seed(1)
    config, model = CLASSES[name]
    return disturbed(model(config(**{**SMALL[name], **options})))


def ids(seed=0, B=3, T=24, V=65):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def without_type_checker(code: str) -> list[str]:
    """What the code prints in a process of its own, as users run the package; it knows this module.

    jaxtyping's checker would object first to a wrong type, and cannot be traced by a compiler.
    """
    done = subprocess.run([sys.executable, "-c", "from gpts import *\n" + code], cwd=ROOT / "tests",
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
