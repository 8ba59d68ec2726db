"""Chapter 14: GPT against transformers, its cache and masks against itself."""
import math
from itertools import pairwise

import pytest
import torch
from gpts import GPT2, LLAMA, SHAPES, ids, random_model, theirs, without_type_checker
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_book.data import document_mask
from llm_book.gpt import GPT, PRESETS, GPTConfig, load_model, padding_mask, require_evaluation


@pytest.fixture(params=SHAPES, ids=lambda name: name)
def model(request):
    return random_model(**SHAPES[request.param])


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


@pytest.mark.parametrize("name", SHAPES)
def test_a_start_at_zero_adds_nothing(name):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPES[name], "vocab_size": 1000, "init": "zero"}))
    x = torch.randn(2, 5, 24)
    for block in model.blocks:
        torch.testing.assert_close(block(x, causal=True), x, rtol=0, atol=0)
        assert abs(block.attention.q_proj.weight.std().item() * math.sqrt(24) / 0.6 - 1) < 0.2
    logits, loss = model(ids(V=1000), ids(1, V=1000))
    if model.config.tied:
        assert abs(model.embedding.weight.std().item() / 0.02 - 1) < 0.05  # no head of its own
    else:
        assert not logits.any() and math.isclose(loss.item(), math.log(1000), rel_tol=1e-6)
    loss.backward()
    assert model.blocks[0].attention.o_proj.weight.grad is not None


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
    (dict(n_heads=5), "n_heads must be a divisor of d_model = 24 where head_dim is not given, not 5"),
    (dict(n_kv_heads=3), "n_kv_heads must be a divisor of n_heads = 4, not 3"),
    (dict(positions="alibi"), "positions must be one of .* not 'alibi'"),
    (dict(norm="batch"), "norm must be one of"), (dict(feed_forward="relu"), "feed_forward must be one of"),
    (dict(bias="some"), "bias must be one of"),
    (dict(positions="rotary", head_dim=5), "head_dim must be even for rotary positions, not 5"),
    (dict(feed_forward="swiglu"), "bias must be 'qkv' or 'none' with feed_forward 'swiglu'"),
    (dict(dropout=1.0), "dropout must be from 0 to below 1, not 1.0"),
    (dict(norm_eps=0.0), "norm_eps must be positive, not 0.0"),
    (dict(rope_theta=math.inf), "rope_theta must be positive, not inf"),
    (dict(rope_theta=math.nan), "rope_theta must be positive, not nan"),
])
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**GPT2, **change})


def test_bad_calls():
    model = GPT(GPTConfig(**GPT2))
    with pytest.raises(ValueError, match="ids must be at most max_len = 24 with what the cache holds, not 25"):
        model(ids(T=25))
    for outside in (-1, 65):
        with pytest.raises(IndexError, match="out of range"):  # torch's own
            model(torch.tensor([[3, outside]]))
    with pytest.raises(ValueError, match=r"targets must be of the shape of ids, \(3, 24\), not .*3, 23"):
        model(ids(), ids(T=23))
    with pytest.raises(ValueError, match=r"targets must be of the shape of ids"):
        model(ids(), ids().mT.contiguous())
    with torch.no_grad():
        cache = model.new_cache(3)
        model(ids(), cache=cache)
        with pytest.raises(ValueError, match="with what the cache holds, not 25"):
            model(ids(T=1), cache=cache)
        small = model.new_cache(3, max_len=4)
        with pytest.raises(ValueError, match=r"max_len must be at least 0 \+ 5"):
            model(ids(T=5), cache=small)


def test_wrong_types_and_shapes_are_refused():
    assert without_type_checker('''
model, ids = GPT(GPTConfig(9, 8, 1, 8, 2)), torch.zeros(2, 4, dtype=torch.long)
for call in (lambda: model(ids[0]), lambda: model(ids[None]), lambda: model(ids, mask=torch.ones(4, 4).bool()),
             lambda: model(ids, n_padding=ids[:1, 0]), lambda: model(ids, n_padding=ids[:, :1]),
             lambda: GPTConfig(9, 8, 1, 8.0, 2), lambda: GPTConfig(9, 8, True, 8, 2),
             lambda: GPTConfig(9, 8, 1, 8, "2"), lambda: GPTConfig(9, 8, 1, 8, 2, tied="no"),
             lambda: GPTConfig(9, 8, 1, 8, 2, qk_norm=None), lambda: GPTConfig(9, 8, 1, 8, 2, dropout="0.1"),
             lambda: GPTConfig(9, 8, 1, 8, 2, norm_eps=None)):
    try:
        call()
    except ValueError as error:
        print(str(error).replace("\\n", ""))
    else:
        print("accepted")
''') == [
        "ids must be of shape (B, T), not (4,)", "ids must be of shape (B, T), not (1, 2, 4)",
        "mask must be of shape (B, T, S), not (4, 4)", "n_padding must be 2 numbers from 0 to 7, not tensor([0])",
        "n_padding must be 2 numbers from 0 to 7, not tensor([[0],        [0]])",
        "d_model must be a whole number of at least 1, not 8.0", "n_layers must be a whole number of at least 1, not True",
        "n_heads must be a whole number of at least 1, not '2'", "tied must be one of (False, True), not 'no'",
        "qk_norm must be one of (False, True), not None", "dropout must be from 0 to below 1, not '0.1'",
        "norm_eps must be positive, not None"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_targets_of_other_integers(dtype):
    model, x, y = random_model(**GPT2), ids(), ids(1)
    y[0, :5] = -100
    assert torch.equal(model(x, y.to(dtype))[1], model(x, y)[1])
    assert torch.equal(model(x.int())[0], model(x)[0])


def test_the_mask_of_packed_documents():
    """With rotary positions, which count distances, a document in a row equals a document alone."""
    model = random_model(**SHAPES["qwen3"])
    x = ids(B=4).clamp(min=1)
    x[0, [0, 7, 15]] = x[1, 0] = x[2, [0, 12]] = x[3, [0, 20]] = 0
    mask = document_mask(x, 0)
    with torch.no_grad():
        logits = model(x, mask=mask)[0]
        assert not torch.allclose(logits[0, 7:], model(x)[0][0, 7:], atol=1e-2)
        for row, starts in ((0, (0, 7, 15, 24)), (1, (0, 24)), (2, (0, 12, 24)), (3, (0, 20, 24))):
            for start, end in pairwise(starts):
                torch.testing.assert_close(logits[row, start:end], model(x[row:row + 1, start:end])[0][0],
                                           atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_mask_belongs_to_rows_and_not_to_heads(name):
    """B = H = T: nothing in the shapes tells a mistake."""
    model, x = random_model(**SHAPES[name]), ids(B=4, T=4)
    mask = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    mask |= torch.eye(4, dtype=torch.bool)
    with torch.no_grad():
        found = model(x, mask=mask)[0]
        for row in range(4):
            torch.testing.assert_close(found[row], model(x[row:row + 1], mask=mask[row:row + 1])[0][0],
                                       atol=1e-4, rtol=1e-4)
        all_open = torch.ones(1, 4, 4, dtype=torch.bool)  # one for all rows
        torch.testing.assert_close(model(x, mask=all_open)[0], model(x)[0], atol=1e-5, rtol=1e-5)


def test_a_mask_with_padding_and_a_cache():
    model, x = random_model(**SHAPES["qwen3"]), ids(B=2).clamp(min=1)
    x[0, [3, 14]] = x[1, [5, 9]] = 0
    n_padding, mask = torch.tensor([3, 5]), document_mask(x, 0)
    with torch.no_grad():
        whole = model(x, n_padding=n_padding, mask=mask)[0]
        for row, n in enumerate((3, 5)):
            alone = model(x[row:row + 1, n:], mask=document_mask(x[row:row + 1, n:], 0))[0]
            torch.testing.assert_close(whole[row, n:], alone[0], atol=1e-4, rtol=1e-4)
        cache, done = model.new_cache(2), []
        for start, end in pairwise((0, 7, 8, 24)):
            done.append(model(x[:, start:end], cache=cache, n_padding=n_padding, mask=mask[:, start:end, :end])[0])
        torch.testing.assert_close(torch.cat(done, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_vmap_export_and_compile():
    """Nothing in a forward pass looks at numbers in order to decide what to do."""
    assert without_type_checker('''
def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

def loss(weights, row, targets):
    return torch.func.functional_call(model, weights, (row[None], targets[None]))[1]

for name in ("gpt2", "qwen3, tied"):
    model, x, y = random_model(**SHAPES[name]), ids(), ids(1)
    weights = {key: value.detach() for key, value in model.named_parameters()}
    close(torch.vmap(lambda row: model(row[None])[0][0])(x), model(x)[0])
    for_each_row = torch.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, y)
    model(x, y)[1].backward()
    for key, parameter in model.named_parameters():
        close(for_each_row[key].mean(0), parameter.grad)
    print("vmap", name)

    sizes = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("T", min=2, max=24)}
    program = torch.export.export(model, (x,), dynamic_shapes={"ids": sizes}).module()
    for B, T in ((1, 2), (2, 24), (5, 7)):
        close(program(ids(B=B, T=T))[0], model(ids(B=B, T=T))[0])
    print("export", name)

    for dynamic in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        n_padding, mask = torch.tensor([0, 3, 9]), torch.ones(3, 24, 24, dtype=torch.bool).tril(3)
        for extra in ({}, dict(mask=mask), dict(n_padding=n_padding)):
            close(compiled(x, y, **extra), model(x, y, **extra))
    print("compile", name)
''') == [f"{what} {name}" for name in ("gpt2", "qwen3, tied") for what in ("vmap", "export", "compile")]


def test_require_evaluation():
    model = GPT(GPTConfig(**GPT2, dropout=0.5))
    with pytest.raises(ValueError, match=r"evaluation mode, since it has dropout; call model.eval\(\)$"):
        require_evaluation(model)
    require_evaluation(model.eval())
    require_evaluation(GPT(GPTConfig(**GPT2)).train())


def test_embed_is_the_stream_that_blocks_read(model):
    x = model.embed(ids())
    for block in model.blocks:
        x = block(x, causal=True)
    torch.testing.assert_close(model.head(model.norm(x)), model(ids())[0])
    if model.positions is not None:
        assert torch.equal(model.embed(ids(T=3), start=5), model.embedding(ids(T=3)) + model.positions.weight[5:8])


def test_other_peoples_caches_and_padding_are_refused(tmp_path):
    model, deep = random_model(**SHAPES["gpt2"]), random_model(**{**SHAPES["gpt2"], "n_layers": 5})
    with pytest.raises(ValueError, match="cache must be 5 parts of one length"):
        deep(ids(), cache=model.new_cache(len(ids())))
    cache = deep.new_cache(len(ids()))
    cache[0].length = 1
    with pytest.raises(ValueError, match=r"one length, not \[1, 0, 0, 0, 0\]"):
        deep(ids(), cache=cache)
    for wrong in ([-1] * len(ids()), [999] * len(ids())):
        with pytest.raises(ValueError, match="n_padding must be"):
            model(ids(), n_padding=torch.tensor(wrong))


def test_attention_is_not_shown_with_dropout():
    model = GPT(GPTConfig(9, 8, 1, 8, 2, dropout=0.5))
    with pytest.raises(ValueError, match="evaluation mode"):
        model.attention_weights(torch.zeros(1, 4, dtype=torch.long))
    assert model.eval().attention_weights(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 1, 2, 4, 4)


def test_a_model_of_the_book_that_is_not_there():
    with pytest.raises(ValueError, match="name must be one of .*, not 'tolstoy'"):
        load_model("tolstoy")


def test_the_books_model_writes_english():
    model, tokenizer = load_model("austen")
    assert not model.training and sum(p.numel() for p in model.parameters()) < 8_000_000
    text = "It is a truth universally acknowledged, that a single man must be in want of a wife."
    row = torch.tensor([tokenizer.encode(text)])
    assert tokenizer.decode(row[0].tolist()) == text
    with torch.no_grad():
        nats = model(row[:, :-1], row[:, 1:])[1].item() * (row.shape[1] - 1)
    assert nats / math.log(2) / len(text) < 2.0  # bits per byte; uniform bytes have 8
