"""Engine room ab: models in GGUF files against transformers' own reader, and files that lie."""
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT
from gpts import CLASSES, LLAMA, SHAPES, ids, random_model
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from llm_book import hub
from llm_book.gguf import GGUFFile, write_gguf
from llm_book.gguf_model import (
    NAMES,
    OPTIONS,
    model_options,
    paired_rows,
    read_model,
    translated,
    unpaired_rows,
)
from llm_book.hub import config_from_hf, config_to_hf

KNOWN = [shape for shape in SHAPES if not shape.startswith("none")]


def changed(path, metadata=(), drop=(), tensors=(), without=()):
    """The file again with other metadata and tensors."""
    file = GGUFFile(path)
    kept = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in file.metadata.items()}
    kept = {name: value for name, value in {**kept, **dict(metadata)}.items() if name not in drop}
    weights = {name: file[name] for name in file if name not in without} | dict(tensors)
    write_gguf(path, kept, weights)


@pytest.mark.parametrize("shape", KNOWN)
def test_a_model_comes_back(shape, tmp_path):
    model = random_model(**SHAPES[shape])
    hub.save_gguf(model, tmp_path / "x.gguf", "F32")
    again = hub.load(tmp_path / "x.gguf")
    assert again.config == model.config and not again.training
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    assert hub.load(tmp_path / "x.gguf", torch.bfloat16).head.weight.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("shape", KNOWN)
def test_transformers_finds_the_same_weights(shape, tmp_path):
    """Its reader knows names, rows and layout by itself; ours never sees this model's folder."""
    model = random_model(**SHAPES[shape])
    hub.save_gguf(model, tmp_path / "x.gguf", "F32")
    options = config_to_hf(model.config)
    config, peer_class = CLASSES[shape.split(",")[0]]
    peer = peer_class(config(**options)).eval()
    found = load_gguf_checkpoint(tmp_path / "x.gguf", return_tensors=True, model_to_load=peer)
    left = peer.load_state_dict(found["tensors"], strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}
    peer.tie_weights()
    torch.testing.assert_close(model(ids())[0], peer(ids()).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(hub.load(tmp_path / "x.gguf")(ids())[0], peer(ids()).logits, atol=1e-4, rtol=0)
    theirs, ours = load_gguf_checkpoint(tmp_path / "x.gguf")["config"], read_model(tmp_path / "x.gguf")[0]
    for name in ours.keys() & theirs.keys() - {"tie_word_embeddings"}:
        assert np.float32(theirs[name]) == np.float32(ours[name]) if isinstance(ours[name], float) else theirs[name] == ours[name]


@torch.no_grad()
@pytest.mark.parametrize("kind, largest", [("F16", 0.02), ("Q8_0", 0.6)])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_smaller_kinds_give_almost_the_same_logits(shape, kind, largest, tmp_path):
    model = random_model(**SHAPES[shape] | dict(d_model=64, d_ff=96))
    hub.save_gguf(model, tmp_path / "x.gguf", kind)
    again = hub.load(tmp_path / "x.gguf")
    difference = (again(ids())[0] - model(ids())[0]).abs().max()
    assert 0 < difference < largest
    kinds = {stored.kind for stored in GGUFFile(tmp_path / "x.gguf").tensors.values()}
    assert kinds == {"F32", kind}
    again.save_pretrained(tmp_path / "folder")
    assert all(map(torch.equal, hub.load(tmp_path / "folder").parameters(), again.parameters()))


def test_a_shape_without_a_family_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="model type must be one of .* not 'llm_book'"):
        hub.save_gguf(random_model(**SHAPES["none, mixed"]), tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="kind must be one of .* not 'Q4_1'"):
        hub.save_gguf(random_model(**LLAMA), tmp_path / "x.gguf", "Q4_1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", OPTIONS)
def test_tables_of_names_go_both_ways(kind):
    back = {new: old for old, new in NAMES[kind].items()}
    assert len(back) == len(NAMES[kind])
    for part in NAMES[kind].keys() - {"blk"}:
        name = f"{part}.weight" if part.startswith(("token", "output", "position")) else f"blk.12.{part}.bias"
        assert translated(translated(name, NAMES[kind]), back) == name


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_rows_go_to_and_fro(heads, half, width):
    weight = torch.randn(heads * 2 * half, width)
    paired = paired_rows(weight, heads)
    expected = weight.reshape(heads, 2, half, width).swapaxes(1, 2).reshape(weight.shape)
    assert torch.equal(paired, expected)
    assert torch.equal(unpaired_rows(paired, heads), weight)


@pytest.mark.parametrize("kind", OPTIONS)
def test_our_names_are_those_of_the_package(kind):
    tensors = gguf.MODEL_TENSORS[gguf.MODEL_ARCH[kind.upper()]]
    theirs = {gguf.TENSOR_NAMES[tensor].removeprefix("blk.{bid}.") for tensor in tensors}
    assert NAMES[kind].keys() - {"blk", "attn_q_norm", "attn_k_norm"} <= theirs


@pytest.fixture
def llama(tmp_path):
    hub.save_gguf(random_model(**LLAMA), tmp_path / "x.gguf", "F32")
    return tmp_path / "x.gguf"


def test_what_files_of_others_say_or_leave_out(llama):
    """Options with a usual value, and those that other programs leave out."""
    expected = hub.load(llama).config
    drop = ["llama.vocab_size", "llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"]
    changed(llama, {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "llama.attention.causal": True,
                    "general.name": "x", "tokenizer.ggml.model": "none"}, drop)
    assert hub.load(llama).config == expected


LIES = {
    "mamba": (dict(metadata={"general.architecture": "mamba"}), "general.architecture must be one of .* not 'mamba'"),
    "none": (dict(drop=["general.architecture"]), "general.architecture must be one of .* not None"),
    "a number": (dict(metadata={"general.architecture": 3}), "general.architecture must be one of .* not 3"),
    "scaling": (dict(metadata={"llama.rope.scaling.type": "yarn"}), "rope.scaling.type must be one of .* not 'yarn'"),
    "window": (dict(metadata={"llama.attention.sliding_window": 8}), "attention.sliding_window must be left out"),
    "experts": (dict(metadata={"llama.expert_count": 8}), "expert_count must be one of .* not 8"),
    "a list": (dict(metadata={"llama.some.list": [1, 2]}), "some.list must be left out"),
    "heads of each layer": (dict(metadata={"llama.attention.head_count": [4, 4]}), "llama.attention.head_count must be one number"),
    "text": (dict(metadata={"llama.block_count": "2"}), "llama.block_count must be one number"),
    "two widths": (dict(metadata={"llama.attention.value_length": 4}), "llama.attention.key_length attention.value_length .* one number"),
    "no width": (dict(drop=["llama.embedding_length"]), "embedding_length must be among the metadata"),
    "no epsilon": (dict(drop=["llama.attention.layer_norm_rms_epsilon"]), "layer_norm_rms_epsilon must be among the metadata"),
    "layers": (dict(metadata={"llama.block_count": 2**31 - 1}), "block_count must be at most the 21 tensors"),
    "context": (dict(metadata={"llama.context_length": 2**31 - 1}), "options must be of a size that fits"),
    "width": (dict(metadata={"llama.embedding_length": 2**31 - 1}), "options must be of a size that fits"),
    "a smaller width": (dict(metadata={"llama.feed_forward_length": 32}), "misshapen: model.layers.0.mlp"),
    "three layers": (dict(metadata={"llama.block_count": 3}), "missing: model.layers.2"),
    "one layer": (dict(metadata={"llama.block_count": 1}), "extra: model.layers.1"),
    "zero heads": (dict(metadata={"llama.attention.head_count": 0}), "n_heads must be a whole number of at least 1"),
    "negative": (dict(metadata={"llama.context_length": -5}), "max_len must be a whole number of at least 1"),
    "stretched positions": (dict(tensors={"rope_freqs.weight": torch.ones(3)}), r"extra: (model\.)?rope_freqs.weight"),
    "missing": (dict(without=["blk.1.attn_q.weight"]), "missing: model.layers.1.self_attn.q_proj.weight"),
    "odd rows": (dict(tensors={"blk.1.attn_q.weight": torch.ones(9, 24)}), "misshapen: model.layers.1.self_attn.q_proj.weight"),
    "a vector": (dict(tensors={"blk.1.attn_q.weight": torch.ones(24)}), "misshapen: model.layers.1.self_attn.q_proj.weight"),
}


@pytest.mark.parametrize("name", LIES)
def test_what_a_liar_is_told(name, llama):
    change, message = LIES[name]
    changed(llama, **change)
    with pytest.raises(ValueError, match=message):
        hub.load(llama)


@pytest.mark.parametrize("content", [b"\x80\x04K\x01.", b"PK\x03\x04" + b"\0" * 100, b"", b"GGUF"])
def test_what_is_no_gguf_file(content, tmp_path):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match="is no GGUF file that we can read"):
        hub.load(tmp_path / "x.bin")
    with pytest.raises(FileNotFoundError):
        hub.load(tmp_path / "none.gguf")


def test_damaged_models_are_sound_or_refused(llama):
    """Random bytes in the metadata and the table: a ValueError, or a model of the file's own shape."""
    whole, rng = llama.read_bytes(), np.random.default_rng(0)
    first = min(stored.start for stored in GGUFFile(llama).tensors.values())
    found = set()
    for _ in range(60):
        content = bytearray(whole)
        content[rng.integers(4, first)] = rng.integers(256)
        llama.write_bytes(content)
        try:
            found.add(sum(p.numel() for p in hub.load(llama).parameters()))
        except ValueError as error:
            found.add(type(error).__name__)
    assert found <= {"ValueError", sum(p.numel() for p in random_model(**LLAMA).parameters())}
    assert len(found) == 2


MEASURE = """
import resource, sys, torch
from llm_book import hub
from llm_book.gpt import GPT
dtype = getattr(torch, sys.argv[2])
status = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
hub.load(sys.argv[3])  # the first time, torch imports parts of itself
open("/proc/self/clear_refs", "w").write("5")
before = status()
model = hub.load(sys.argv[1], dtype)
print((status() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_little_more_memory_than_the_model(dtype, tmp_path):
    model = random_model(**LLAMA | dict(vocab_size=8_000, d_model=512, n_layers=10, n_heads=8, d_ff=1536, head_dim=64, tied=True))
    hub.save_gguf(model, tmp_path / "x.gguf", "Q8_0")
    hub.save_gguf(random_model(**LLAMA), tmp_path / "small.gguf")
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "x.gguf", dtype, tmp_path / "small.gguf"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.9 < float(done.stdout) < 1.3


def test_options_are_those_of_the_folder(llama, tmp_path):
    """What the file says is what config.json would say."""
    model = hub.load(llama)
    options = model_options(GGUFFile(llama))
    assert config_from_hf(options) == model.config
    assert {name: value for name, value in config_to_hf(model.config).items() if name in options} == options
