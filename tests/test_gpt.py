"""Chapter 14: GPT against transformers, its cache against itself, its files against damage."""
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
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

from llm_book.gpt import GPT, PRESETS, GPTConfig, config_from_hf, padding_mask

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
    "gpt2, other heads": dict(GPT2, head_dim=5), "gpt2, grouped": dict(GPT2, n_kv_heads=2),
    "no family": dict(LLAMA, positions="learned", feed_forward="gelu", qk_norm=True),
}
CLASSES = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM,
           "qwen3": Qwen3ForCausalLM}


def random_model(seed=0, **options) -> GPT:
    """A GPT in which no weight has the value that initialisation gives, so that each one counts."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ids(seed=0, B=3, T=24, V=65):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=SHAPES, ids=lambda name: name)
def model(request):
    return random_model(**SHAPES[request.param])


def family_of(folder):
    return json.loads((folder / "config.json").read_text())["model_type"]


# ---- Hugging Face's folders

def theirs(name, **options):
    torch.manual_seed(1)
    common = dict(vocab_size=65, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=4,
                  max_position_embeddings=24, intermediate_size=40)
    makes = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=65, n_positions=24, n_embd=24, n_layer=2,
                                                   n_head=4, **options)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**common, **options})),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**common, **options})),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**{**common, **options})),
    }
    model = makes[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


THEIRS = [("gpt2", {}), ("gpt2", dict(n_inner=50)), ("gpt2", dict(tie_word_embeddings=False)),
          ("llama", {}), ("llama", dict(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
          ("llama", dict(head_dim=10, tie_word_embeddings=True)),
          ("qwen2", dict(num_key_value_heads=1)), ("qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
          ("qwen3", dict(num_key_value_heads=2, head_dim=8)), ("qwen3", dict(num_key_value_heads=4))]


@pytest.mark.parametrize("name, options", THEIRS)
def test_we_read_what_transformers_writes(name, options, tmp_path):
    peer = theirs(name, **options)
    peer.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert not ours.training
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
    with torch.no_grad():
        torch.testing.assert_close(ours(ids())[0], peer(ids()).logits, atol=1e-4, rtol=0)


def test_we_read_shards(tmp_path):
    peer = theirs("llama")
    peer.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(tmp_path)(ids())[0], peer(ids()).logits,
                                   atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 10_000])
def test_transformers_reads_what_we_write(model, max_shard_bytes, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes)
    n_files = len(list(tmp_path.glob("*.safetensors")))
    assert n_files == 1 if max_shard_bytes > 10**9 else n_files > 1
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    for (name, ours), other in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(ours, other), name
    if (family := family_of(tmp_path)) != "llm_book":
        peer, report = CLASSES[family].from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        with torch.no_grad():
            torch.testing.assert_close(model(ids())[0], peer.eval()(ids()).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, family", [("gpt2", "gpt2"), ("llama", "llama"), ("qwen2", "qwen2"),
                                          ("qwen3", "qwen3"), ("no family", "llm_book")])
def test_families(name, family, tmp_path):
    random_model(**SHAPES[name]).save_pretrained(tmp_path)
    assert family_of(tmp_path) == family


def test_names_of_a_bare_model_and_old_buffers(tmp_path):
    """The first GPT-2 files: no `transformer.` in front, and masks among the weights."""
    peer = theirs("gpt2")
    peer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    weights["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(tmp_path)(ids())[0], peer(ids()).logits,
                                   atol=1e-4, rtol=0)


def test_names_of_a_bare_llama_and_its_old_buffers(tmp_path):
    peer = theirs("llama", tie_word_embeddings=True)
    peer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(tmp_path)(ids())[0], peer(ids()).logits,
                                   atol=1e-4, rtol=0)


def test_options_that_old_files_leave_out(tmp_path):
    """config.json of GPT-2 names few options; Llama's had rope_theta on the first level."""
    peer = theirs("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    peer.save_pretrained(tmp_path)
    options = json.loads((tmp_path / "config.json").read_text())
    del options["rope_parameters"], options["tie_word_embeddings"], options["head_dim"]
    options["rope_theta"] = 5e5
    (tmp_path / "config.json").write_text(json.dumps(options))
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(tmp_path)(ids())[0], peer(ids()).logits,
                                   atol=1e-4, rtol=0)


def test_dtype(tmp_path):
    model = random_model(**LLAMA).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert GPT.from_pretrained(tmp_path).embedding.weight.dtype == torch.float32
    again = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again.embedding.weight, model.embedding.weight)


def damaged(folder, change):
    random_model(**GPT2).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("transformer.h.1.mlp.c_fc.bias"), r"missing: transformer\.h\.1\.mlp\.c_fc\.bias"),
    (lambda w: w.update({"transformer.h.2.ln_1.bias": torch.zeros(24)}), r"extra: transformer\.h\.2\.ln_1\.bias"),
    (lambda w: w.update({"transformer.wpe.weight": torch.zeros(25, 24)}),
     r"misshapen: transformer\.wpe\.weight is \(25, 24\) instead of \(24, 24\)"),
    (lambda w: w.update({"lm_head.weight": torch.zeros(65, 24)}), r"extra: lm_head\.weight"),
])
def test_damaged_weights_are_named(change, message, tmp_path):
    damaged(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_a_copy_of_the_tied_head_is_no_damage(tmp_path):
    damaged(tmp_path, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].clone()}))
    GPT.from_pretrained(tmp_path)


def test_pickles_and_broken_files_are_refused(tmp_path):
    random_model(**GPT2).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        GPT.from_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must be safetensors, not pytorch_model\.bin"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, message", [
    (dict(model_type="bert"), "model_type must be one of .*'gpt2'.* not 'bert'"),
    (dict(activation_function="relu"), "activation_function must be 'gelu_new' in config.json, not 'relu'"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx must be False"),
    (dict(n_head=5), "n_heads must divide d_model = 24"),
    (dict(model_type="llama", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}),
     "rope_type must be 'default' in config.json, not 'llama3'"),
])
def test_unknown_options_are_refused(change, message, tmp_path):
    random_model(**GPT2).save_pretrained(tmp_path)
    options = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_saving_over_an_older_model_leaves_nothing_of_it(tmp_path):
    random_model(**GPT2).save_pretrained(tmp_path, 10_000)
    (tmp_path / "model_notes.safetensors").write_bytes(b"mine")
    random_model(1, **GPT2).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", "model_notes.safetensors"]
    assert torch.equal(GPT.from_pretrained(tmp_path).embedding.weight,
                       random_model(1, **GPT2).embedding.weight)


# ---- the model

def test_gradients_equal_those_of_transformers(tmp_path):
    for name in ("gpt2", "qwen3"):
        peer = theirs(name)
        peer.save_pretrained(tmp_path / name)
        ours = GPT.from_pretrained(tmp_path / name)
        x, y = ids(), ids(1)
        y[0, :5] = -100
        loss = ours(x, y)[1]
        logits = peer(x).logits
        expected = torch.nn.functional.cross_entropy(logits.mT, y)
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.embedding.weight.grad, peer.get_input_embeddings().weight.grad,
                                   atol=1e-5, rtol=1e-3)


def test_ignored_targets_do_not_count(model):
    x, y = ids(), ids(1)
    kept = y.clone()
    y[:, 5:] = -100
    logits, loss = model(x, y)
    expected = -logits.log_softmax(-1).gather(-1, kept[..., None])[:, :5].mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype, expected", [(torch.float64, torch.float64), (torch.float32, torch.float32),
                                             (torch.bfloat16, torch.float32)])
def test_the_loss_is_at_least_single_precision(dtype, expected):
    model = random_model(**GPT2).to(dtype)
    logits, loss = model(ids(), ids(1))
    assert logits.dtype == dtype and loss.dtype == expected


def filled(chunks, total):
    """`chunks` cut, or repeated, so that they add up to `total`."""
    out, i = [], 0
    while total:
        out.append(min(chunks[i % len(chunks)], total))
        total -= out[-1]
        i += 1
    return out


@settings(max_examples=25)
@given(st.sampled_from([*SHAPES]), st.lists(st.integers(1, 9), min_size=1), st.integers(0, 99))
def test_cached_equals_uncached_for_any_chunks(name, chunks, seed):
    model = random_model(**SHAPES[name])
    x, done = ids(seed, B=2), []
    with torch.no_grad():
        expected, _ = model(x)
        cache = model.new_cache(2)
        for chunk in x.split(filled(chunks, 24), 1):
            done.append(model(chunk, cache=cache)[0])
    torch.testing.assert_close(torch.cat(done, 1), expected, atol=1e-4, rtol=1e-4)
    assert all(part.length == 24 for part in cache)


@settings(max_examples=25)
@given(st.sampled_from([*SHAPES]), st.lists(st.integers(1, 9), min_size=1), st.integers(0, 23))
def test_rows_filled_up_at_the_left_equal_rows_alone(name, chunks, n):
    model, x = random_model(**SHAPES[name]), ids(n, B=2)
    n_padding, done = torch.tensor([0, n]), []
    with torch.no_grad():
        expected = [model(x[i:i + 1, n_padding[i]:])[0][0] for i in (0, 1)]
        cache = model.new_cache(2)
        for chunk in x.split(filled(chunks, 24), 1):
            done.append(model(chunk, cache=cache, n_padding=n_padding)[0])
        for found in (model(x, n_padding=n_padding)[0], torch.cat(done, 1)):
            assert found.isfinite().all()  # in the filling too
            for i in (0, 1):
                torch.testing.assert_close(found[i, n_padding[i]:], expected[i], atol=1e-4, rtol=1e-4)


def test_padding_mask_by_hand():
    mask = padding_mask(torch.tensor([0, 2]), 1, 2)  # places 1 and 2 ask, of three
    assert mask.int().tolist() == [[[[1, 1, 1], [1, 1, 1]]], [[[0, 1, 1], [0, 0, 1]]]]


def test_the_future_does_not_leak(model):
    x = ids()
    changed = x.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 65
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0][:, :12], model(changed)[0][:, :12])
        assert not torch.allclose(model(x)[0][:, 12:], model(changed)[0][:, 12:])


def test_attention_weights(model):
    weights = model.attention_weights(ids())
    assert weights.shape == (2, 3, model.config.n_heads, 24, 24)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, model.config.n_heads, 24))
    assert (weights.triu(1) == 0).all()


def test_attention_weights_equal_those_of_transformers(tmp_path):
    peer = theirs("gpt2")
    peer.set_attn_implementation("eager")
    peer.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = torch.stack(peer(ids(), output_attentions=True).attentions)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path).attention_weights(ids()), expected,
                               atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_first_loss_is_near_ln_V(name):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPES[name], "vocab_size": 1000}))
    assert abs(model(ids(V=1000), ids(1, V=1000))[1].item() - math.log(1000)) < 0.1


def test_initialisation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, max_len=64, n_layers=8, d_model=128, n_heads=4))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            last = name.endswith(("o_proj.weight", "down.weight"))
            expected = 0.02 / math.sqrt(2 * 8) if last else 0.02
            assert abs(parameter.std().item() / expected - 1) < 0.05, name


def test_dropout_works_in_training_only():
    model = GPT(GPTConfig(**GPT2, dropout=0.5))
    with torch.no_grad():
        assert not torch.equal(model(ids())[0], model(ids())[0])
        model.eval()
        assert torch.equal(model(ids())[0], model(ids())[0])


def test_tied_head_is_one_matrix():
    model = GPT(GPTConfig(**GPT2))
    assert model.head.weight is model.embedding.weight
    assert GPT(GPTConfig(**LLAMA)).head.weight is not GPT(GPTConfig(**LLAMA)).embedding.weight


def test_presets_have_the_published_sizes():
    for name, millions in (("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)):
        with torch.device("meta"):
            model = GPT(GPTConfig.preset(name))
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert GPTConfig.preset("llama-style", n_layers=2).n_layers == 2
    assert all(GPTConfig.preset(name) for name in PRESETS)
    with pytest.raises(ValueError, match="name must be one of .*'gpt2-xl'.* not 'gpt3'"):
        GPTConfig.preset("gpt3")


@pytest.mark.parametrize("change, message", [
    (dict(vocab_size=0), "vocab_size must be a whole number of at least 1, not 0"),
    (dict(max_len=-1), "max_len must be a whole number of at least 1, not -1"),
    (dict(n_layers=0), "n_layers must be"), (dict(d_model=0), "d_model must be"),
    (dict(n_heads=0), "n_heads must be"), (dict(head_dim=0), "head_dim must be"),
    (dict(d_ff=0), "d_ff must be"), (dict(n_kv_heads=0), "n_kv_heads must be"),
    (dict(n_heads=5), "n_heads must divide d_model = 24 where head_dim is not given, not be 5"),
    (dict(n_kv_heads=3), "n_kv_heads must divide n_heads = 4, not be 3"),
    (dict(positions="alibi"), "positions must be one of .* not 'alibi'"),
    (dict(norm="batch"), "norm must be one of"), (dict(feed_forward="relu"), "feed_forward must be one of"),
    (dict(bias="some"), "bias must be one of"),
    (dict(positions="rotary", head_dim=5), "head_dim must be even for rotary positions, not 5"),
    (dict(feed_forward="swiglu"), "bias must be 'qkv' or 'none' with feed_forward 'swiglu'"),
    (dict(dropout=1.0), "dropout must be from 0 to below 1, not 1.0"),
    (dict(norm_eps=0.0), "norm_eps must be positive, not 0.0"),
    (dict(rope_theta=math.inf), "rope_theta must be positive, not inf"),
])
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**GPT2, **change})


def test_bad_calls():
    model = GPT(GPTConfig(**GPT2))
    with pytest.raises(ValueError, match="ids must end at place 24 at most, not at 25"):
        model(ids(T=25))
    with pytest.raises(ValueError, match="ids must be from 0 to 64, not 3 … 65"):
        model(torch.tensor([[3, 65]]))
    with pytest.raises(ValueError, match=r"targets must have the shape of ids, \(3, 24\), not \(3, 23\)"):
        model(ids(), ids(T=23))
    with torch.no_grad():
        cache = model.new_cache(3)
        model(ids(), cache=cache)
        with pytest.raises(ValueError, match="at place 24 at most, not at 25"):
            model(ids(T=1), cache=cache)
        small = model.new_cache(3, max_len=4)
        with pytest.raises(ValueError, match=r"max_len must be at least 0 \+ 5"):
            model(ids(T=5), cache=small)


def interrupted(monkeypatch, model, folder, n_writes: int, **options):
    """Save, and fail when the file after `n_writes` complete ones is written."""
    done = []

    def write(weights, path, **about):
        if len(done) == n_writes:
            raise OSError("disk full")
        done.append(path)
        return save_file(weights, path, **about)

    monkeypatch.setattr("llm_book.gpt.save_file", write)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder, **options)
    monkeypatch.undo()


@pytest.mark.parametrize("n_writes", [0, 1, 2])
def test_a_save_that_fails_leaves_the_older_model(n_writes, tmp_path, monkeypatch):
    older, newer = (random_model(**SHAPES["gpt2"]) for _ in range(2))
    older.save_pretrained(tmp_path, 10_000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    interrupted(monkeypatch, newer, tmp_path, n_writes, max_shard_bytes=10_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_that_is_killed_while_names_change_loads_as_no_model(tmp_path, monkeypatch):
    older, newer = (random_model(**SHAPES["gpt2"]) for _ in range(2))
    older.save_pretrained(tmp_path, 10_000)
    renamed, replace = [], type(tmp_path).replace

    def dies(self, target):
        if len(renamed) == 2:
            raise KeyboardInterrupt
        renamed.append(target)
        return replace(self, target)

    monkeypatch.setattr(type(tmp_path), "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        newer.save_pretrained(tmp_path, 10_000)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="config.json"):
        GPT.from_pretrained(tmp_path)


def test_other_peoples_caches_and_padding_are_refused(tmp_path):
    model, deep = random_model(**SHAPES["gpt2"]), random_model(**{**SHAPES["gpt2"], "n_layers": 5})
    with pytest.raises(ValueError, match="cache must have 5 parts of one length"):
        deep(ids(), cache=model.new_cache(len(ids())))
    cache = deep.new_cache(len(ids()))
    cache[0].length = 1
    with pytest.raises(ValueError, match=r"one length, not \[1, 0, 0, 0, 0\]"):
        deep(ids(), cache=cache)
    for wrong in ([-1] * len(ids()), [999] * len(ids())):
        with pytest.raises(ValueError, match="n_padding must be"):
            model(ids(), n_padding=torch.tensor(wrong))


def test_configs_that_lack_or_invent_options():
    with pytest.raises(ValueError, match="must have n_embd, n_head$"):
        config_from_hf({"model_type": "gpt2", "vocab_size": 9, "n_positions": 8, "n_layer": 1})
    with pytest.raises(ValueError, match="must have max_len and must not have sliding_window"):
        config_from_hf({"model_type": "llm_book", "vocab_size": 9, "n_layers": 1, "d_model": 8,
                        "n_heads": 1, "sliding_window": 8})


def test_attention_is_not_shown_with_dropout():
    model = GPT(GPTConfig(9, 8, 1, 8, 2, dropout=0.5))
    with pytest.raises(ValueError, match="evaluation mode"):
        model.attention_weights(torch.zeros(1, 4, dtype=torch.long))
    assert model.eval().attention_weights(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 1, 2, 4, 4)
