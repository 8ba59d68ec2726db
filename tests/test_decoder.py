"""The decoder: the model's own logits, from the model's own weights, whatever happens to them."""
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_models import SHAPES, Itself, generator, gpt, prompt
from torch import nn
from torch.nn.utils import parametrize

from llm_book.block import FeedForward
from llm_book.decoder import (
    LARGE,
    Decoder,
    decoder_for,
    load_int8,
    matrix_vector,
    quantise,
    save_int8,
)
from llm_book.generate import generate, stream
from llm_book.gpt import GPT

GREEDY = dict(temperature=0)


def one_by_one(model, ids, n_prompt=5, n_padding=None):
    """Logits of a prompt and of what follows it token for token, with one cache."""
    cache = model.new_cache(len(ids))
    with torch.no_grad():
        pieces = [model(ids[:, :n_prompt], cache=cache, n_padding=n_padding)[0]]
        pieces += [model(ids[:, i:i + 1], cache=cache, n_padding=n_padding)[0]
                   for i in range(n_prompt, ids.shape[1])]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [1, 2, 3])
@pytest.mark.parametrize("kind", SHAPES)
def test_decoder_gives_the_models_logits(kind, n_rows, dtype):
    model = gpt(kind, spread=1.0).to(dtype)
    ids = torch.randint(23, (n_rows, 20), generator=generator())
    close = dict(rtol=0.1, atol=0.1) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-4)
    for n_padding, start in ((None, 0), (torch.tensor([3, 0, 4][:n_rows]), 4)):
        with torch.no_grad():
            right = model(ids, n_padding=n_padding)[0]
        found = one_by_one(Decoder(model), ids, n_padding=n_padding)
        assert found.dtype == dtype
        torch.testing.assert_close(found[:, start:], right[:, start:], **close)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("n_rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoder_in_half_precision_is_near(kind, n_rows, dtype):
    model, ids = gpt(kind, spread=1.0), torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])
    exact, half = (one_by_one(each, ids[:n_rows], 3)[:, -1] for each in (Decoder(model), Decoder(model, dtype)))
    assert half.dtype == torch.float32
    off = (half - exact).norm() / exact.norm()
    assert 0 < off < (0.01 if dtype == torch.float16 else 0.08)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (7, 3), (8, 4), (50, 1)])
def test_a_product_in_pieces(shape, n):
    weight, x = torch.randn(shape, generator=generator()), torch.randn(shape[1], generator=generator(1))
    for laid_out in (weight, weight.T.contiguous().T, weight.repeat(1, 2)[:, :shape[1]]):
        torch.testing.assert_close(matrix_vector(laid_out, x, n), weight @ x)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("bias", ["all", "none"])
def test_large_matrices_are_read_by_several_threads(n_threads, bias):
    model = gpt(d_model=512, n_layers=1, n_heads=4, vocab_size=601, bias=bias, spread=1.0)
    assert model.head.weight.numel() >= LARGE
    ids, before = torch.randint(601, (1, 12), generator=generator()), torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        decoder = Decoder(model)
        for _ in range(2):
            with torch.no_grad():
                right = model(ids)[0]
            torch.testing.assert_close(one_by_one(decoder, ids), right, rtol=1e-3, atol=1e-3)
            data_replaced(model)  # it follows, though it cuts the matrices
        assert torch.equal(generate(model, ids, 20, **GREEDY), generate(Itself(model), ids, 20, **GREEDY))
    finally:
        torch.set_num_threads(before)


def test_half_precision_of_the_models_own_dtype_copies_nothing():
    model = gpt().bfloat16()
    decoder = Decoder(model, torch.bfloat16)
    ids = prompt(1, 2, 3, 4)
    before = one_by_one(decoder, ids, 2)
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert not torch.equal(before, one_by_one(decoder, ids, 2))


def trained(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.arange(20)[None] % 7, torch.arange(1, 21)[None] % 7)[1].backward()
        optimizer.step()


def data_replaced(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0)


def parameter_replaced(model):
    model.blocks[0].feed_forward.up.weight = nn.Parameter(-model.blocks[0].feed_forward.up.weight.detach())
    model.norm.weight = nn.Parameter(3 * model.norm.weight.detach())


def state_loaded(model, assign=False):
    model.load_state_dict(gpt(seed=5).state_dict(), assign=assign)


CHANGES = {"trained": trained, "data": data_replaced, "parameters": parameter_replaced,
           "state": state_loaded, "assigned": lambda model: state_loaded(model, True),
           "dtype": lambda model: model.double(), "half": lambda model: model.bfloat16(),
           "deleted": lambda model: model.blocks.__delitem__(0)}


@pytest.mark.parametrize("name", CHANGES)
def test_generate_reads_the_weights_as_they_are_at_each_call(name):
    model, ids = gpt(), prompt(3, 1, 4)
    before = generate(model, ids, 30, **GREEDY)
    CHANGES[name](model)
    after = generate(model, ids, 30, **GREEDY)
    assert torch.equal(after, generate(Itself(model), ids, 30, **GREEDY))
    if name not in ("dtype", "half"):
        assert not torch.equal(after, before)


@pytest.mark.parametrize("name", ["trained", "data", "state"])
def test_a_decoder_that_is_kept_follows_its_models_weights(name):
    model, ids = gpt(), prompt(3, 1, 4, 1, 5, 9)
    decoder, before = Decoder(model), one_by_one(Decoder(model), prompt(3, 1, 4, 1, 5, 9), 2)
    CHANGES[name](model)
    after = one_by_one(decoder, ids, 2)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, one_by_one(model, ids, 2), rtol=1e-3, atol=1e-3)


class Doubled(nn.Linear):
    """A layer that does more than its weight says, as an adapter does."""

    def forward(self, x):
        return 2 * super().forward(x)


class Other(GPT):
    def forward(self, ids, *args, **kwargs):
        logits, loss = super().forward(ids, *args, **kwargs)
        return -logits, loss


def with_adapter(model):
    layer = model.blocks[1].attention.v_proj
    model.blocks[1].attention.v_proj = Doubled(layer.in_features, layer.out_features)
    return model


def with_hook(model):
    model.blocks[0].feed_forward.register_forward_hook(lambda module, x, y: -y)
    return model


def with_pre_hook(model):
    model.blocks[1].register_forward_pre_hook(lambda module, x: (-x[0],))
    return model


def with_forward(model):
    whole = model.blocks[0].forward
    model.blocks[0].forward = lambda *args, **kwargs: -whole(*args, **kwargs)
    return model


def with_parametrization(model):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model.blocks[0].attention.q_proj, "weight", Twice())
    return model


def other_class(model):
    changed = Other(model.config).eval()
    changed.load_state_dict(model.state_dict())
    return changed


def with_activation(model):
    model.blocks[0].feed_forward.activation = nn.Tanh()
    return model


def with_norms_after(model):
    model.blocks[1].pre_norm = False
    return model


def with_embed(model):
    model.embed = lambda *args: -GPT.embed(model, *args)
    return model


@pytest.mark.parametrize("change", [with_adapter, with_hook, with_pre_hook, with_forward, with_parametrization,
                                    other_class, with_activation, with_norms_after, with_embed],
                         ids=lambda change: change.__name__)
def test_a_changed_model_is_asked_itself(change):
    model, ids = change(copy.deepcopy(gpt())), prompt(3, 1, 4)
    assert decoder_for(model) is model
    found = generate(model, ids, 30, **GREEDY)
    assert torch.equal(found, generate(Itself(model), ids, 30, **GREEDY))
    assert not torch.equal(found, generate(gpt(), ids, 30, **GREEDY))


def test_a_forward_pass_that_is_replaced_for_a_whole_class_is_asked(monkeypatch):
    model, ids = gpt(), prompt(3, 1, 4)
    before, forward = generate(model, ids, 30, **GREEDY), FeedForward.forward
    monkeypatch.setattr(FeedForward, "forward", lambda self, x: -forward(self, x))
    assert decoder_for(model) is model
    assert not torch.equal(generate(model, ids, 30, **GREEDY), before)
    monkeypatch.undo()
    assert type(decoder_for(model)) is Decoder and torch.equal(generate(model, ids, 30, **GREEDY), before)


def test_a_hook_on_all_modules_is_asked():
    model, ids = gpt(), prompt(3, 1, 4)
    before = generate(model, ids, 30, **GREEDY)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, x, y: -y if isinstance(module, FeedForward) else None)
    try:
        assert decoder_for(model) is model
        assert not torch.equal(generate(model, ids, 30, **GREEDY), before)
    finally:
        hook.remove()
    assert type(decoder_for(model)) is Decoder


@pytest.mark.parametrize("n_rows", [1, 2])
@pytest.mark.parametrize("kind", SHAPES)
def test_under_autocast_it_says_what_the_model_says(kind, n_rows):
    model, ids = gpt(kind), torch.randint(23, (n_rows, 4), generator=generator())
    tokens = stream(model, ids, 30, **GREEDY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        right = generate(Itself(model), ids, 30, **GREEDY)
        assert torch.equal(generate(model, ids, 30, **GREEDY), right)
        found = [next(tokens)]
    found += list(tokens)  # what was begun inside goes on outside
    assert len(found) == 30 and torch.equal(found[0], right[:, 4])


def test_a_decoder_is_made_for_every_plain_gpt_and_for_nothing_else():
    for kind in SHAPES:
        model = gpt(kind)
        decoder = decoder_for(model)
        assert type(decoder) is Decoder and decoder.model is model and decoder_for(decoder) is decoder
        hook = model.register_forward_hook(lambda *_: None)
        assert decoder_for(model) is model
        hook.remove()
        assert type(decoder_for(model)) is Decoder
    wrapped = Itself(gpt())
    assert decoder_for(wrapped) is wrapped
    layer = nn.Linear(2, 2)
    assert decoder_for(layer) is layer


def test_a_decoder_is_in_training_when_its_model_is():
    model = gpt(dropout=0.5)
    decoder = Decoder(model.eval())
    model.train()
    for each in (decoder, model):
        with pytest.raises(ValueError, match="evaluation mode"):
            generate(each, prompt(1), 3)
    model.eval()
    assert generate(decoder, prompt(1), 3).shape == (1, 4) and decoder.device == model.device


def test_the_cache_of_another_model_is_refused():
    decoder, cache = Decoder(gpt()), gpt(n_layers=3).new_cache(1)
    with pytest.raises(ValueError):
        decoder(prompt(1), cache=cache)


def test_decoding_outside_of_no_grad_leaves_no_graph():
    decoder = Decoder(gpt())
    cache = decoder.new_cache(1)
    for _ in range(3):
        assert not decoder(prompt(1), cache=cache)[0].requires_grad
    assert not decoder(prompt(1, 2))[0].requires_grad


@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 9))
def test_eight_bits_are_off_by_half_a_scale(seed, rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0  # a row without any size
    numbers, scale = quantise(weight)
    assert numbers.dtype == torch.int8 and numbers.abs().max() <= 127
    assert ((numbers * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert not numbers[0].any()


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_in_eight_bits(name, tmp_path):
    model = gpt(name, spread=1.0)
    save_int8(model, tmp_path / "small")
    small = load_int8(tmp_path / "small")
    assert small.config == model.config and not small.training
    assert (small.head.weight is small.embedding.weight) == model.config.tied
    for (one, before), (other, after) in zip(model.named_parameters(), small.named_parameters(), strict=True):
        assert one == other and after.dtype == torch.float32
        if before.ndim == 1:
            assert torch.equal(before, after)
        else:
            numbers, scale = quantise(before.detach())
            assert torch.equal(after, numbers * scale[:, None])
    save_int8(small, tmp_path / "again")  # once rounded, it stays as it is
    again = load_int8(tmp_path / "again")
    torch.testing.assert_close(again.state_dict(), small.state_dict(), rtol=1e-6, atol=0)
    assert (tmp_path / "small").stat().st_size < 0.5 * sum(4 * p.numel() for p in model.parameters()) + 9_000


def test_a_file_that_is_not_in_eight_bits_is_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="path must be a file that save_int8 has written, not .*other"):
        load_int8(tmp_path / "other.safetensors")
