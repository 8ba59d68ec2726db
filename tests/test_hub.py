"""Engine room a2: folders against transformers, both ways, and against damage, mixture and lies."""
import json
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from gpts import (
    CLASSES,
    GPT2,
    LLAMA,
    SHAPES,
    SMALL,
    ids,
    random_model,
    theirs,
    without_type_checker,
)
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaForCausalLM

from llm_book import hub
from llm_book.gpt import GPT, GPTConfig
from llm_book.hub import FAMILIES, config_from_hf, config_to_hf, weights_from_hf, weights_to_hf


@torch.no_grad()
def assert_same(ours, peer):
    torch.testing.assert_close(ours(ids())[0], peer(ids()).logits, atol=1e-4, rtol=0)


def change_config(folder, drop=(), **options):
    """Other options in config.json."""
    config = json.loads((folder / "config.json").read_text()) | options
    for name in drop:
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    """Other weights: `change` is given all of them by name, and may return others."""
    weights = load_file(folder / "model.safetensors")
    weights = change(weights) or weights
    save_file(weights, folder / "model.safetensors")


def equal(a: GPT, b: GPT) -> bool:
    return a.config == b.config and all(map(torch.equal, a.parameters(), b.parameters()))


# ---- families

THEIRS = [("gpt2", {}), ("gpt2", dict(n_inner=50)), ("gpt2", dict(tie_word_embeddings=False)),
          ("gpt2", dict(activation_function="gelu_pytorch_tanh", reorder_and_upcast_attn=True)),
          ("llama", {}), ("llama", dict(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
          ("llama", dict(head_dim=10, tie_word_embeddings=True)), ("llama", dict(hidden_act="swish")),
          ("qwen2", dict(num_key_value_heads=1)), ("qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
          ("qwen2", dict(sliding_window=4, use_sliding_window=False)),
          ("qwen3", dict(num_key_value_heads=2, head_dim=8)), ("qwen3", dict(num_key_value_heads=4))]


@pytest.mark.parametrize("name, options", THEIRS)
def test_we_read_what_transformers_writes(name, options, tmp_path):
    peer = theirs(name, **options)
    peer.save_pretrained(tmp_path)
    ours = hub.load(tmp_path)
    assert not ours.training
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
    assert_same(ours, peer)


def test_we_read_shards(tmp_path):
    peer = theirs("llama")
    peer.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(hub.load(tmp_path), peer)


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 10_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_what_we_write(shape, max_shard_bytes, tmp_path):
    model = random_model(**SHAPES[shape])
    hub.save(model, tmp_path, max_shard_bytes)
    n_files = len(list(tmp_path.glob("*.safetensors")))
    assert n_files == 1 if max_shard_bytes > 10**9 else n_files > 1
    assert equal(hub.load(tmp_path), model)
    family = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert family == shape.split(",")[0].replace("none", "llm_book")
    if family != "llm_book":
        peer, report = CLASSES[family][1].from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert_same(model, peer.eval())


@pytest.mark.parametrize("name", CLASSES)
def test_a_state_dict_in_memory_is_enough(name):
    peer = theirs(name)
    ours = GPT(config_from_hf(peer.config.to_dict()))
    weights_from_hf(ours.eval(), name, peer.state_dict())
    assert_same(ours, peer)
    expected = peer.state_dict()
    for their_name, weight in weights_to_hf(ours, name).items():
        assert torch.equal(weight, expected[their_name])


def test_the_two_doors_of_the_model(tmp_path):
    model = random_model(**LLAMA)
    model.save_pretrained(tmp_path, 10_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert equal(GPT.from_pretrained(tmp_path), model)
    assert GPT.from_pretrained(tmp_path, torch.bfloat16).head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_that_goes_to_and_fro(name, tmp_path):
    """Saved by us, read and saved again by transformers in the same place, read by us."""
    hub.save(random_model(**SHAPES[name]), tmp_path)
    peer = CLASSES[name][1].from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.mul_(1.1)
    peer.save_pretrained(tmp_path)
    assert_same(hub.load(tmp_path), peer.eval())


# ---- options

OPTIONS = [(kind, name, allowed) for kind, family in FAMILIES.items()
           for name, allowed in family.fixed.items()]


def smallest(kind: str) -> dict:
    """A config.json that says no more than it must."""
    return config_to_hf(GPTConfig(**SHAPES["none, mixed" if kind == "llm_book" else kind]))


@pytest.mark.parametrize("kind, name, allowed", OPTIONS)
def test_options_with_one_meaning_are_refused_with_any_other(kind, name, allowed):
    options = smallest(kind)
    assert options["model_type"] == kind
    config = config_from_hf(options)
    for value in allowed:
        assert config_from_hf({**options, name: value}) == config
    wrong = not allowed[0] if allowed and isinstance(allowed[0], bool) else "something else"
    with pytest.raises(ValueError, match=f"{name} must be"):
        config_from_hf({**options, name: wrong})


DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
ROPES = [dict(rope_theta=5e5), dict(rope_theta=5e5, rope_scaling=None), dict(rope_parameters=DEFAULT),
         dict(rope_theta=5e5, rope_scaling={}), dict(rope_theta=5e5, rope_scaling={"rope_type": "default"}),
         dict(rope_theta=5e5, rope_scaling={"type": "default"}), dict(rope_scaling=DEFAULT),
         dict(rope_theta=1e4, rope_parameters=DEFAULT), dict(rope_theta=5e5, rope_parameters={"partial_rotary_factor": 1.0}),
         dict(rope_theta=5e5, rope_interleaved=False)]


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_all_ways_to_say_plain_rotary_positions(rope, tmp_path):
    peer = theirs("llama", rope_parameters=DEFAULT)
    peer.save_pretrained(tmp_path)
    change_config(tmp_path, ["rope_parameters", "rope_theta"])
    change_config(tmp_path, **rope)
    assert_same(hub.load(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path).eval())


SCALED = [{"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}, {"type": "dynamic", "factor": 2.0},
          {"rope_type": "yarn", "factor": 4.0}, {"type": "llama3", "factor": 8.0}, {"type": "default", "rope_type": "linear"},
          {"rope_type": "default", "factor": 4.0}, {"factor": 4.0}, {"rope_type": "default", "something": 1},
          {"partial_rotary_factor": 0.5}, {"full_attention": {"rope_type": "default"}}]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "llm_book"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope", SCALED, ids=str)
def test_other_rotary_positions_are_refused(kind, key, rope):
    with pytest.raises(ValueError, match=r"(rope_type|factor|something|full_attention|partial_\w+) must be"):
        config_from_hf({**smallest(kind), key: rope})


@pytest.mark.parametrize("kind, options, message", [
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"], sliding_window=4), "layer_types must be 'full_attention' in"),
    ("qwen2", dict(use_sliding_window=True, sliding_window=4), "use_sliding_window must be False"),
    ("llama", dict(sliding_window=4), "sliding_window must be left out of config.json, not 4"),
    ("llama", dict(rope_local_base_freq=1e4), "rope_local_base_freq must be left out"),
    ("llama", dict(quantization_config={"quant_method": "fp8"}), "quantization_config must be left out"),
    ("llama", dict(rope_scaling="linear"), "rope_scaling must be a JSON object, not 'linear'"),
    ("gpt2", dict(activation_function="relu"), "activation_function must be 'gelu_new' or .* not 'relu'"),
    ("gpt2", dict(attn_pdrop=0.5), "resid_pdrop attn_pdrop embd_pdrop must be one number"),
    ("gpt2", dict(model_type="bert"), "model_type must be one of .*'gpt2'.* not 'bert'"),
    ("gpt2", dict(model_type=["gpt2"]), r"model_type must be one of .* not \['gpt2'\]"),
    ("gpt2", dict(model_type=None), "model_type must be one of .* not None"),
    ("gpt2", dict(n_head=5), "n_heads must be a divisor of d_model = 24"),
    ("gpt2", dict(n_embd=None, n_layer=None), "config.json must have n_layer, n_embd$"),
    ("llm_book", dict(sliding_window=8), "sliding_window must be left out of config.json, not 8"),
    ("llm_book", dict(max_len=None), "config.json must have max_len"),
])
def test_options_that_we_have_no_code_for_are_refused_by_name(kind, options, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**smallest(kind), **options})


def test_options_of_a_wrong_type_are_refused():
    assert without_type_checker('''
from llm_book.hub import config_from_hf, config_to_hf
options = config_to_hf(GPTConfig(**LLAMA))
for change in (dict(num_attention_heads="4"), dict(rms_norm_eps="1e-6"), dict(rope_theta="1e4"), dict(tie_word_embeddings="no")):
    try:
        config_from_hf(options | change)
    except ValueError as error:
        print(error)
''') == ["n_heads must be a whole number of at least 1, not '4'", "norm_eps must be positive, not '1e-6'",
         "rope_theta must be positive, not '1e4'", "tied must be one of (False, True), not 'no'"]


def test_options_that_transformers_does_not_read_either_are_passed_over(tmp_path):
    peer = theirs("llama")
    peer.save_pretrained(tmp_path)
    change_config(tmp_path, eos_token_id=[1, 2], use_cache=False, task_specific_params={}, pretraining_tp=2, note="mine")
    assert_same(hub.load(tmp_path), peer)


def test_options_that_old_files_leave_out(tmp_path):
    """config.json of GPT-2 names few options; Llama's had rope_theta on the first level."""
    peer = theirs("llama", rope_parameters=DEFAULT)
    peer.save_pretrained(tmp_path)
    change_config(tmp_path, ["rope_parameters", "tie_word_embeddings", "head_dim"], rope_theta=5e5)
    assert_same(hub.load(tmp_path), peer)
    few = {"model_type": "gpt2", "n_embd": 24, "n_head": 4, "n_layer": 2}
    assert config_from_hf(few) == GPTConfig(50_257, 1024, 2, 24, 4, dropout=0.1)
    assert config_from_hf(GPT2Config(**SMALL["gpt2"]).to_dict()).dropout == 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_configuration_comes_back(shape):
    config = GPTConfig(**SHAPES[shape])
    for changed in (config, replace(config, dropout=0.3), replace(config, norm_eps=1e-4), replace(config, rope_theta=7.0)):
        assert config_from_hf(json.loads(json.dumps(config_to_hf(changed)))) == changed


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", "", "\"gpt2\"", "{}"])
def test_what_is_no_configuration(content, tmp_path):
    hub.save(random_model(**GPT2), tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError):
        hub.load(tmp_path)


# ---- weights

def bare(weights):
    return {name.removeprefix("transformer.").removeprefix("model."): w for name, w in weights.items()}


def old_gpt2(weights):
    """The first GPT-2 files: no `transformer.` in front, and masks among the weights."""
    return bare(weights) | {"h.0.attn.bias": torch.ones(1, 1, 24, 24).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}


def old_llama(weights):
    return bare(weights) | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}


def wrapped(*wrappers):
    return lambda weights: {"".join(wrappers) + name: w for name, w in weights.items()}


def head_only(weights):
    name = next(name for name in weights if name.endswith(("wte.weight", "embed_tokens.weight")))
    return {"lm_head.weight" if key == name else key: w for key, w in weights.items()}


def head_too(weights):
    return weights | {"lm_head.weight": head_only(weights)["lm_head.weight"].clone()}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("change", [
    bare, lambda w: old_llama(w) if "model.norm.weight" in w else old_gpt2(w), head_only, head_too, wrapped("module."),
    wrapped("_orig_mod."), wrapped("_orig_mod.", "module."), wrapped("module.", "_orig_mod."),
    lambda w: {name.replace(".0.", ".0._orig_mod."): x for name, x in w.items()}])
def test_harmless_oddities_of_real_files(kind, change, tmp_path):
    peer = theirs(kind, tie_word_embeddings=True)
    peer.save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    assert_same(hub.load(tmp_path), peer)


def test_models_that_are_wrapped_are_saved_under_their_own_names(tmp_path):
    model, parts = random_model(**LLAMA), random_model(**LLAMA)
    parts.blocks[0] = torch.compile(parts.blocks[0])
    hub.save(parts, tmp_path / "parts")
    assert equal(hub.load(tmp_path / "parts"), model)
    without_type_checker(f'''
from llm_book import hub
hub.save(torch.compile(random_model(**LLAMA)), {str(tmp_path / "whole")!r})
''')
    assert equal(hub.load(tmp_path / "whole"), model)


C_FC = "transformer.h.1.mlp.c_fc.bias"


@pytest.mark.parametrize("change, message", [
    (lambda w: {name: w[name] for name in w if name != C_FC}, rf"missing: {C_FC}$"),
    (lambda w: w.update({"transformer.h.2.ln_1.bias": torch.zeros(24)}), r"extra: transformer\.h\.2\.ln_1\.bias$"),
    (lambda w: w.update({"transformer.wpe.weight": torch.zeros(25, 24)}),
     r"misshapen: transformer\.wpe\.weight is \(25, 24\) of torch.float32 instead of \(24, 24\)"),
    (lambda w: w.update({"lm_head.weight": torch.zeros(65, 24)}), r"extra: lm_head\.weight"),
    (lambda w: w.update({C_FC: w[C_FC].to(torch.int8)}), r"misshapen: .*c_fc\.bias is \(96,\) of torch.int8"),
    (lambda w: w.update({"module." + C_FC: w[C_FC].clone()}), f"{C_FC} must be stored once"),
    (lambda w: {"other": torch.zeros(1)}, r"missing: (transformer\.\S+, ){2}transformer\.\S+ and 25 more; extra: "),
])
def test_damaged_weights_are_named(change, message, tmp_path):
    hub.save(random_model(**GPT2), tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        hub.load(tmp_path)
    assert len(str(error.value)) < 600


def test_nothing_is_copied_before_all_fits():
    model, other = random_model(**GPT2), random_model(3, **GPT2)
    weights = {name: w.clone() for name, w in weights_to_hf(other, "gpt2").items()}
    weights.pop("transformer.ln_f.bias")
    with pytest.raises(ValueError, match=r"missing: transformer\.ln_f\.bias"):
        weights_from_hf(model, "gpt2", weights)
    assert equal(model, random_model(**GPT2))


def test_the_fused_matrix_of_gpt2_by_hand():
    model = random_model(**GPT2)
    stored, attention = weights_to_hf(model, "gpt2")["transformer.h.1.attn.c_attn.weight"], model.blocks[1].attention
    assert stored.shape == (24, 72)
    x = torch.randn(5, 24)
    q, k, v = (x @ stored).chunk(3, -1)
    for found, part in ((q, attention.q_proj), (k, attention.k_proj), (v, attention.v_proj)):
        torch.testing.assert_close(found, x @ part.weight.T)


# ---- dtype and memory

def test_dtype(tmp_path):
    model = random_model(**LLAMA).to(torch.bfloat16)
    hub.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert hub.load(tmp_path).embedding.weight.dtype == torch.float32
    again = hub.load(tmp_path, dtype=torch.bfloat16)
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    assert torch.equal(again.float()(ids())[0], hub.load(tmp_path)(ids())[0])  # tables were not cast


@pytest.mark.parametrize("shape", ["gpt2", "qwen3, tied"])
def test_a_loaded_model_can_do_what_any_model_can(shape, tmp_path):
    model = random_model(**SHAPES[shape])
    hub.save(model, tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = hub.load(tmp_path)
    assert torch.equal(torch.rand(1), expected)  # no random number was drawn
    assert again.head.weight is again.embedding.weight
    assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])
    for each in (model, again):
        each.train()(ids(), ids(1))[1].backward()
    for a, b in zip(model.parameters(), again.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=0, rtol=0)


PEAK = """
import sys, torch
from pathlib import Path
from llm_book import hub

def status(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024

small = hub.load(sys.argv[1] + "/small", torch.bfloat16)  # what is loaded only once
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = status("VmRSS")
model = hub.load(sys.argv[1] + "/large", getattr(torch, sys.argv[2]))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family, dtype", [("gpt2", "bfloat16"), ("llama", "bfloat16"), ("llama", "float32")])
def test_memory_while_loading_is_little_more_than_the_model(family, dtype, tmp_path):
    shape = dict(SHAPES[family], n_layers=12, d_model=512, vocab_size=5_000, d_ff=None)
    with torch.device("meta"):
        size = sum(p.numel() for p in GPT(GPTConfig(**shape)).parameters()) * (2 if dtype == "bfloat16" else 4) / 2**20
    hub.save(GPT(GPTConfig(**shape)).to(torch.bfloat16), tmp_path / "large")
    hub.save(random_model(**SHAPES[family]), tmp_path / "small")
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path, dtype], cwd=ROOT, capture_output=True, text=True)
    peak = float(done.stdout)
    assert 0.8 * size < peak < 1.3 * size + 5, (peak, size)


# ---- files

def test_pickles_and_broken_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        hub.load(tmp_path)
    hub.save(random_model(**GPT2), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (whole[:-10], whole[:5], b"", b"\xff" * 100, whole + b"more"):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            hub.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        hub.load(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights must be safetensors .*'pytorch_model\.bin'"):
        hub.load(tmp_path)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saving_over_another_form_of_model(tmp_path):
    older, newer = random_model(**LLAMA), random_model(1, **LLAMA)
    for model, size in ((older, 10_000), (newer, 10**9), (older, 10_000), (newer, 20_000)):
        hub.save(model, tmp_path, size)
        assert equal(hub.load(tmp_path), model)


def test_transformers_leaves_things_of_an_older_model(tmp_path):
    older, newer = theirs("llama"), theirs("llama", rms_norm_eps=1e-3)
    older.save_pretrained(tmp_path, max_shard_size="10KB")
    newer.save_pretrained(tmp_path)
    assert (tmp_path / hub.INDEX).exists()  # of the older one; its shards are gone
    assert_same(hub.load(tmp_path), newer)
    older.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / hub.SINGLE).exists()  # of the newer one, which transformers would load
    with pytest.raises(ValueError, match=r"weights must be one file or shards, not \['model.safetensors', 'model-00001"):
        hub.load(tmp_path)


def test_a_single_file_that_somebody_puts_beside_shards(tmp_path):
    old, new = theirs("llama"), theirs("llama", rms_norm_eps=1e-3)
    new.save_pretrained(tmp_path / "new")
    old.save_pretrained(tmp_path / "old", max_shard_size="10KB")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "new" / name).rename(tmp_path / "old" / name)
    with pytest.raises(ValueError, match="weights must be one file or shards"):
        hub.load(tmp_path / "old")
    for shard in (tmp_path / "old").glob("model-*"):
        shard.unlink()
    assert_same(hub.load(tmp_path / "old"), new)


@pytest.mark.parametrize("change, message", [
    (lambda index: [], "must be a JSON object"), (lambda index: {}, "weight_map must be a JSON object"),
    (lambda index: {"weight_map": 3}, "weight_map must be a JSON object"),
    (lambda index: {"weight_map": dict.fromkeys(index["weight_map"], "../secret.safetensors")}, "weight_map must be"),
    (lambda index: {"weight_map": dict.fromkeys(index["weight_map"], 3)}, "weight_map must be"),
    (lambda index: {"weight_map": dict(list(index["weight_map"].items())[1:])}, r"a list of all weights in its files, not \['"),
    (lambda index: {"weight_map": index["weight_map"] | {"more": "model-00001-of-00003.safetensors"}}, r"not \['more'\]"),
])
def test_an_index_that_lies(change, message, tmp_path):
    random_model(**GPT2).save_pretrained(tmp_path, 30_000)
    index = json.loads((tmp_path / hub.INDEX).read_text())
    assert len(set(index["weight_map"].values())) == 3
    (tmp_path / hub.INDEX).write_text(json.dumps(change(index)))
    with pytest.raises(ValueError, match=message):
        hub.load(tmp_path)


def test_a_missing_shard(tmp_path):
    random_model(**GPT2).save_pretrained(tmp_path, 30_000)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        hub.load(tmp_path)


def test_a_mixture_of_two_models_is_refused(tmp_path):
    for seed, name in enumerate("ab"):
        hub.save(random_model(seed, **GPT2), tmp_path / name, 30_000)
    b = files(tmp_path / "b")
    for name in b:
        if name != hub.INDEX:  # the same in both
            original = (tmp_path / "a" / name).read_bytes()
            (tmp_path / "a" / name).write_bytes(b[name])
            with pytest.raises(ValueError, match="llm_book_save of model-0000.-of-00003.safetensors must be"):
                hub.load(tmp_path / "a")
            (tmp_path / "a" / name).write_bytes(original)
    assert equal(hub.load(tmp_path / "a"), random_model(**GPT2))


def test_saving_over_an_older_model_leaves_nothing_of_it(tmp_path):
    hub.save(random_model(**GPT2), tmp_path, 10_000)
    (tmp_path / "model_notes.safetensors").write_bytes(b"mine")
    hub.save(random_model(1, **GPT2), tmp_path)
    assert sorted(files(tmp_path)) == ["config.json", "model.safetensors", "model_notes.safetensors"]
    assert equal(hub.load(tmp_path), random_model(1, **GPT2))


@pytest.mark.parametrize("n_writes", [0, 1, 2])
def test_a_save_that_fails_leaves_the_older_model(n_writes, tmp_path, monkeypatch):
    hub.save(random_model(**GPT2), tmp_path, 10_000)
    before, done = files(tmp_path), []

    def write(weights, path, **about):
        if len(done) == n_writes:
            raise OSError("disk full")
        done.append(path)
        return save_file(weights, path, **about)

    monkeypatch.setattr("llm_book.hub.save_file", write)
    with pytest.raises(OSError, match="disk full"):
        hub.save(random_model(1, **GPT2), tmp_path, 10_000)
    assert files(tmp_path) == before


def test_a_save_that_is_killed_while_names_change_loads_as_no_model(tmp_path, monkeypatch):
    hub.save(random_model(**GPT2), tmp_path, 30_000)
    n_files, replace_file = len(files(tmp_path)), type(tmp_path).replace
    for n_renamed in range(n_files):
        renamed = []

        def dies(self, target, n_renamed=n_renamed, renamed=renamed):
            if len(renamed) == n_renamed:
                raise KeyboardInterrupt
            renamed.append(target)
            return replace_file(self, target)

        monkeypatch.setattr(type(tmp_path), "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            hub.save(random_model(1, **GPT2), tmp_path, 30_000)
        monkeypatch.undo()
        with pytest.raises(FileNotFoundError, match="config.json"):
            hub.load(tmp_path)
        assert not list(tmp_path.glob("draft_*"))
    hub.save(random_model(1, **GPT2), tmp_path, 30_000)
    assert equal(hub.load(tmp_path), random_model(1, **GPT2))


def test_two_savers_and_a_reader(tmp_path):
    """Whatever the reader gets is one of the two models; between saves it may be none."""
    models, stop, failures, found = [random_model(seed, **GPT2) for seed in (0, 1)], threading.Event(), [], []

    def keep_saving(model):
        while not stop.is_set():
            try:
                hub.save(model, tmp_path, 30_000)
            except OSError:  # the other one has just taken a file away
                pass

    def keep_loading():
        for _ in range(60):
            try:
                model = hub.load(tmp_path)
            except (FileNotFoundError, ValueError):
                continue
            found.append(model)
            if not any(equal(model, whole) for whole in models):
                failures.append(model)

    savers = [threading.Thread(target=keep_saving, args=(model,)) for model in models]
    for thread in savers:
        thread.start()
    keep_loading()
    stop.set()
    for thread in savers:
        thread.join()
    assert not failures
    hub.save(models[0], tmp_path)
    assert equal(hub.load(tmp_path), models[0])
