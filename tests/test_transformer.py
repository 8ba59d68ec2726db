"""Chapter 13: the encoder language model and the encoder–decoder, held against torch.nn."""
import math

import pytest
import torch
from einops import EinopsError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llm_book.attention import KVCache, attention_weights, causal_mask
from llm_book.positions import PositionalEncoding
from llm_book.transformer import (
    EncoderDecoder,
    Transformer,
    cross_attention_weights,
    decoder_block,
    encoder_block,
    from_torch_masks,
    pad_rows,
    teacher_forcing,
)

PAD, BEGIN, END = 0, 1, 2
SHAPE = {"n_vocab": 11, "d_model": 8, "nhead": 2, "num_layers": 2, "dim_feedforward": 12}
seeds = st.integers(0, 1000)
pytestmark = [pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
              pytest.mark.filterwarnings("ignore:The PyTorch API of nested")]


class Peer(nn.Module):
    """The same model made of torch's layers."""

    def __init__(self, n_vocab, d_model, nhead, num_layers, dim_feedforward, dropout=0.0):
        super().__init__()
        self.encoder = nn.Embedding(n_vocab, d_model)
        self.pos_encoder = PositionalEncoding(d_model, dropout)
        self.transformer_encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d_model, nhead, dim_feedforward, dropout, batch_first=True),
            num_layers)
        self.fc_out = nn.Linear(d_model, n_vocab)

    def forward(self, src, src_mask=None, src_key_padding_mask=None):
        x = self.pos_encoder(self.encoder(src) * math.sqrt(self.encoder.embedding_dim))
        return self.fc_out(self.transformer_encoder(x, src_mask, src_key_padding_mask))


def stir(model):
    """Biases and norms that are not zero and one."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model


def pair(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {**SHAPE, **changes}
    theirs, ours = stir(Peer(**shape)), Transformer(**shape, dropout=0.0)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


MASKS = {"none": lambda T, H, B: None,
         "bool": lambda T, H, B: ~causal_mask(T),
         "float": lambda T, H, B: torch.zeros(T, T).masked_fill(~causal_mask(T), -math.inf),
         "weights": lambda T, H, B: torch.randn(T, T),
         "bool 3d": lambda T, H, B: (torch.rand(B * H, T, T) < 0.5) & ~torch.eye(T).bool(),
         "float 3d": lambda T, H, B: torch.randn(B * H, T, T)}


def paddings(kind, B, T):
    if kind == "none":
        return None
    padding = torch.arange(T) >= torch.randint(1, T + 1, (B, 1))
    return padding if kind == "bool" else torch.zeros(B, T).masked_fill(padding, -math.inf)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@settings(max_examples=4)
@given(B=st.integers(1, 3), T=st.integers(1, 7), H=st.sampled_from([1, 2, 4]), L=st.integers(1, 3),
       training=st.booleans(), seed=seeds)
def test_equals_torch(mask, padding, B, T, H, L, training, seed):
    changes = {"nhead": H, "num_layers": L}
    ours, theirs = pair(seed, **changes)
    ours.train(training), theirs.train(training)
    src = torch.randint(11, (B, T))
    masks = MASKS[mask](T, H, B), paddings(padding, B, T)
    if masks[0] is not None and masks[0].ndim == 3 and masks[1] is not None:
        # no query may be left with nothing to see, or the answer is a matter of taste
        masks = masks[0], torch.zeros_like(masks[1])
    a, b = ours(src, *masks), theirs(src, *masks)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(a)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    expected = Transformer(**{**SHAPE, **changes})
    expected.load_state_dict({name: p.grad for name, p in theirs.named_parameters()})
    for (name, p), q in zip(ours.named_parameters(), expected.parameters()):
        torch.testing.assert_close(p.grad, q.data, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_equals_the_fast_path_at_real_positions(mask, padding):
    ours, theirs = pair()
    ours.eval(), theirs.eval()
    src, masks = torch.randint(11, (3, 5)), (MASKS[mask](5, 2, 3), paddings(padding, 3, 5))
    real = torch.ones(3, 5).bool() if masks[1] is None else masks[1] == 0
    with torch.no_grad():
        torch.testing.assert_close(ours(src, *masks)[real], theirs(src, *masks)[real],
                                   rtol=1e-4, atol=1e-5)


def test_rows_of_padding_are_finite_and_leave_the_others_alone():
    ours, theirs = pair()
    src, future = torch.randint(11, (2, 4)), ~causal_mask(4)
    padding = torch.tensor([[False, False, True, True], [True] * 4])
    for one in (None, future, torch.zeros(4, 4).masked_fill(future, -math.inf)):
        ours.zero_grad()
        out = ours(src, one, padding)
        assert out.isfinite().all()
        torch.testing.assert_close(out[:1], ours(src[:1], one, padding[:1]))
        out.sum().backward()
        assert all(p.grad.isfinite().all() for p in ours.parameters())
    ours.eval()
    with torch.no_grad():
        assert ours(src, None, padding).isfinite().all()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.sampled_from(["none", "bool", "float"]),
       st.sampled_from(["none", "2d bool", "2d float", "3d bool", "3d float"]), seeds)
def test_masks_by_brute_force(B, H, T, padding, mask, seed):
    torch.manual_seed(seed)

    def make(kind, *shape):
        forbidden = torch.rand(shape) < 0.4
        return None if kind == "none" else forbidden if "bool" in kind else torch.randn(shape).masked_fill(
            forbidden, -math.inf)

    src_mask = make(mask, *((B * H, T, T) if "3d" in mask else (T, T)))
    pad = make(padding, B, T)
    ours = from_torch_masks(src_mask, pad, H)
    if src_mask is None and pad is None:
        assert ours is None
        return
    both_bool = all(m is None or m.dtype == torch.bool for m in (src_mask, pad))
    assert (ours.dtype == torch.bool) == both_bool
    ours = ours.expand(B, H, T, T)

    def worth(m, *where):
        if m is None:
            return 0.0
        x = m[where].item()
        return (-math.inf if x else 0.0) if m.dtype == torch.bool else x

    for b in range(B):
        for h in range(H):
            for t in range(T):
                for s in range(T):
                    lead = (b * H + h,) if "3d" in mask else ()
                    added = worth(src_mask, *lead, t, s) + worth(pad, b, s)
                    found = ours[b, h, t, s].item()
                    assert (found == (added == 0)) if both_bool else math.isclose(found, added, rel_tol=1e-5)


@pytest.mark.parametrize("mask, padding, error", [
    (torch.ones(2, 2, dtype=torch.int64), None, ValueError), (None, torch.ones(1, 2, dtype=torch.int64), ValueError),
    (torch.zeros(2, 2).bool(), torch.zeros(1, 2, dtype=torch.int64), ValueError),
    (torch.ones(2, dtype=torch.bool), None, EinopsError), (torch.ones(1, 2, 2, 2).bool(), None, EinopsError),
    (None, torch.ones(1, 1, 2).bool(), EinopsError), (torch.ones(3, 2, 2).bool(), None, EinopsError),
])
def test_refuses_masks(mask, padding, error):
    message = "masks must be bool" if error is ValueError else None  # shapes are einops's to refuse
    with pytest.raises(error, match=message):
        from_torch_masks(mask, padding, 2)
    with pytest.raises(error, match=message):
        Transformer(**SHAPE)(torch.zeros(1, 2, dtype=torch.int64), mask, padding)


def test_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="n_heads must be a divisor of 8, not 3"):
        Transformer(**{**SHAPE, "nhead": 3})


@pytest.mark.parametrize("shape", [(20, 1, 8), (1, 20, 8), (20, 8)])
def test_a_table_of_sinusoids_is_accepted(shape):
    _, theirs = pair()
    weights = {**theirs.state_dict(), "pos_encoder.pe": torch.zeros(shape)}
    before = set(weights)
    ours = Transformer(**SHAPE, dropout=0.0)
    result = ours.load_state_dict(weights)
    assert not result.missing_keys and not result.unexpected_keys and set(weights) == before
    src = torch.randint(11, (2, 5))
    torch.testing.assert_close(ours(src), theirs(src))


def test_missing_extra_and_misshapen_weights_are_reported():
    _, theirs = pair()
    weights = theirs.state_dict()
    del weights["transformer_encoder.layers.1.self_attn.in_proj_bias"]
    weights["transformer_encoder.norm.weight"] = torch.ones(8)
    weights["transformer_encoder.layers.7.norm1.bias"] = torch.ones(8)
    result = Transformer(**SHAPE).load_state_dict(weights, strict=False)
    assert set(result.missing_keys) == {f"transformer_encoder.1.attention.{x}_proj.bias" for x in "qkv"}
    assert set(result.unexpected_keys) == {"transformer_encoder.norm.weight",
                                           "transformer_encoder.7.attention_norm.bias"}
    with pytest.raises(RuntimeError, match="q_proj.bias"):
        Transformer(**SHAPE).load_state_dict(weights)
    weights = theirs.state_dict()
    weights["transformer_encoder.layers.0.self_attn.in_proj_weight"] = torch.zeros(27, 8)
    with pytest.raises(RuntimeError, match="size mismatch for transformer_encoder.0.attention"):
        Transformer(**SHAPE).load_state_dict(weights)


def test_our_own_weights_and_a_model_inside_another():
    ours, theirs = pair()
    again = Transformer(**SHAPE, dropout=0.0)
    again.load_state_dict(ours.state_dict())
    outer = nn.ModuleDict({"model": Transformer(**SHAPE, dropout=0.0)})
    outer.load_state_dict({f"model.{name}": p for name, p in theirs.state_dict().items()})
    src = torch.randint(11, (2, 5))
    assert torch.equal(again(src), ours(src)) and torch.equal(outer["model"](src), ours(src))


def test_half_precision_masks():
    ours, _ = pair()
    ours.bfloat16()
    mask = torch.zeros(4, 4).masked_fill(~causal_mask(4), -math.inf)
    assert ours(torch.randint(11, (2, 4)), mask).dtype == torch.bfloat16


def test_dropout_is_for_training_only():
    model = Transformer(**SHAPE, dropout=0.5)
    src = torch.randint(11, (2, 5))
    assert not torch.equal(model(src), model(src))
    model.eval()
    assert torch.equal(model(src), model(src))
    places = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert places == [0.5] * (1 + 2 * 2)  # positions, and two in each block
    assert all(block.attention.dropout == 0.5 for block in model.transformer_encoder)


def test_causal_mask_hides_the_future():
    model, _ = pair()
    src = torch.randint(11, (1, 6))
    before, masked = model(src), model(src, ~causal_mask(6))
    for s in range(6):
        changed = src.clone()
        changed[0, s] = (src[0, s] + 1) % 11
        moved = (model(changed, ~causal_mask(6)) != masked)[0].any(-1)
        assert not moved[:s].any() and moved[s:].all()
        assert (model(changed) != before)[0].any(-1).all()


# --- encoder–decoder -------------------------------------------------------------------------

def make(seed=0, shared=False, n_layers=2, **options):
    torch.manual_seed(seed)
    sizes = (11, 11) if shared else (13, 11)
    model = EncoderDecoder(*sizes, 8, 2, n_layers, 12, dropout=0.0, shared=shared, **options)
    return stir(model).eval()


def random_rows(seed, n=4, longest=6):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 11, (int(torch.randint(1, longest + 1, (), generator=g)),),
                          generator=g).tolist() for _ in range(n)]


def torch_stacks(model):
    """The same weights in nn.TransformerEncoder and nn.TransformerDecoder."""
    def pack(attention):
        parts = [getattr(attention, f"{x}_proj") for x in "qkv"]
        return {"in_proj_weight": torch.cat([p.weight for p in parts]),
                "in_proj_bias": torch.cat([p.bias for p in parts]),
                "out_proj.weight": attention.o_proj.weight, "out_proj.bias": attention.o_proj.bias}

    def fill(layer, block, norms, attentions):
        weights = {f"{theirs}.{k}": v for theirs, ours in attentions.items()
                   for k, v in pack(getattr(block, ours)).items()}
        for theirs, module in {**{f"norm{i}": getattr(block, n) for i, n in enumerate(norms, 1)},
                               "linear1": block.feed_forward.up, "linear2": block.feed_forward.down}.items():
            weights |= {f"{theirs}.weight": module.weight, f"{theirs}.bias": module.bias}
        layer.load_state_dict(weights)

    options = {"dim_feedforward": 12, "dropout": 0.0, "batch_first": True}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **options), len(model.encoder))
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, **options), len(model.decoder))
    for layer, block in zip(encoder.layers, model.encoder):
        fill(layer, block, ("attention_norm", "feed_forward_norm"), {"self_attn": "attention"})
    for layer, block in zip(decoder.layers, model.decoder):
        fill(layer, block, ("attention_norm", "cross_attention_norm", "feed_forward_norm"),
             {"self_attn": "attention", "multihead_attn": "cross_attention"})
    return encoder, decoder


@settings(max_examples=20)
@given(seeds, st.booleans(), st.booleans(), st.integers(1, 2))
def test_encoder_decoder_equals_torch(seed, shared, padded, n_layers):
    model = make(seed, shared, n_layers)
    encoder, decoder = torch_stacks(model)
    rows = random_rows(seed)
    src, real = pad_rows(rows, PAD)
    if not padded:
        real = torch.ones_like(real)
    tgt = torch.randint(11, (4, 5))

    def theirs():
        scale = math.sqrt(8)
        memory = encoder(model.positions(model.src_embedding(src) * scale), src_key_padding_mask=~real)
        y = model.positions(model.tgt_embedding(tgt) * scale)
        out = decoder(y, memory, tgt_mask=~causal_mask(5), memory_key_padding_mask=~real)
        return model.head(out)

    mine = model(src, tgt, real if padded else None)
    torch.testing.assert_close(mine, theirs(), rtol=1e-4, atol=1e-5)
    gradients = []
    for f in (lambda: model(src, tgt, real), theirs):
        model.zero_grad()
        f().square().mean().backward()
        gradients.append([p.grad.clone() for e in (model.src_embedding, model.tgt_embedding, model.head)
                          for p in e.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@given(seeds, st.booleans())
def test_a_padded_batch_equals_one_at_a_time(seed, shared):
    model, rows = make(seed, shared), random_rows(seed)
    src, real = pad_rows(rows, PAD)
    inputs, _ = teacher_forcing(random_rows(seed + 1), BEGIN, END, PAD)
    with torch.no_grad():
        together = model(src, inputs, real)
        for i, row in enumerate(rows):
            n = int((inputs[i] != PAD).sum())
            alone = model(torch.tensor([row]), inputs[i:i + 1, :n])
            torch.testing.assert_close(together[i:i + 1, :n], alone, rtol=1e-4, atol=1e-5)


def test_what_stands_at_padding_does_not_matter():
    model = make()
    src, real = pad_rows([[3, 4, 5], [6]], PAD)
    other = src.masked_fill(~real, 9)
    tgt = torch.randint(11, (2, 4))
    assert torch.equal(model(src, tgt, real), model(other, tgt, real))
    assert not torch.equal(model(src, tgt), model(other, tgt))
    assert torch.equal(model.greedy(src, 5, BEGIN, END, real), model.greedy(other, 5, BEGIN, END, real))


def test_an_empty_source_is_finite():
    model = make()
    out = model(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64),
                torch.zeros(1, 3, dtype=torch.bool))
    assert out.isfinite().all()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_target_is_causal_and_sees_the_whole_source():
    model = make()
    src, tgt = torch.randint(3, 11, (1, 5)), torch.randint(3, 11, (1, 6))
    before = model(src, tgt)
    for s in range(6):
        changed = tgt.clone()
        changed[0, s] = tgt[0, s] - 1
        moved = (model(src, changed) != before)[0].any(-1)
        assert not moved[:s].any() and moved[s:].all()
    for s in range(5):
        changed = src.clone()
        changed[0, s] = src[0, s] - 1
        assert (model(changed, tgt) != before)[0].any(-1).all()


def slow_greedy(model, row, max_new_tokens):
    written = []
    while len(written) < max_new_tokens and END not in written:
        logits = model(torch.tensor([row]), torch.tensor([[BEGIN, *written]]))
        written.append(logits[0, -1].argmax().item())
    return written


@settings(max_examples=30)
@given(seeds, st.integers(1, 9))
def test_greedy_equals_the_slow_loop(seed, max_new_tokens):
    torch.manual_seed(seed)
    model = stir(EncoderDecoder(13, 4, 8, 2, 1, 12)).eval()  # of four tokens one is the end
    rows = random_rows(seed)
    src, real = pad_rows(rows, PAD)
    written = model.greedy(src, max_new_tokens, BEGIN, END, real)
    slow = [slow_greedy(model, row, max_new_tokens) for row in rows]
    assert written.shape == (4, max(map(len, slow)))
    for ids, expected in zip(written.tolist(), slow):
        assert ids == expected + [END] * (len(ids) - len(expected))


def test_greedy_ends():
    model = make()
    nn.init.zeros_(model.head.weight)
    src = torch.tensor([[3, 4], [5, 6]])
    assert model.greedy(src, 9, bos_id=1, eos_id=0).tolist() == [[0], [0]]  # argmax of equals is 0
    assert model.greedy(src, 9, bos_id=1, eos_id=2).tolist() == [[0] * 9] * 2
    assert not model.greedy(src, 9, 1, 2).requires_grad


def test_a_row_that_has_ended_stays_ended(monkeypatch):
    model, script = make(), iter([[5, 5], [END, 6], [7, 7], [8, END], [9, 9]])
    read = []

    def scripted(tgt, memory, src_real, cache):
        read.append(tgt.flatten().tolist())
        return nn.functional.one_hot(torch.tensor(next(script)), 11).float()[:, None]

    monkeypatch.setattr(model, "decode", scripted)
    src = torch.tensor([[3, 4], [5, 6]])
    assert model.greedy(src, 9, BEGIN, END).tolist() == [[5, END, END, END], [5, 6, 7, END]]
    assert read == [[BEGIN, BEGIN], [5, 5], [END, 6], [END, 7]]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), seeds)
def test_decoding_in_pieces_equals_decoding_at_once(pieces, seed):
    model = make(seed)
    src, real = pad_rows(random_rows(seed, n=2), PAD)
    tgt = torch.randint(11, (2, sum(pieces)))
    cache = [KVCache(2, 2, 12, 4) for _ in model.decoder]
    with torch.no_grad():
        memory = model.encode(src, real)
        parts = [model.decode(piece, memory, real, cache) for piece in tgt.split(pieces, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(src, tgt, real), rtol=1e-4, atol=1e-5)


def test_shared_embeddings():
    model, separate = make(shared=True), EncoderDecoder(11, 11, 8, 2, 2, 12)
    assert model.head.weight is model.src_embedding.weight is model.tgt_embedding.weight
    count = [sum(p.numel() for p in m.parameters()) for m in (separate, model)]
    assert count[0] - count[1] == 2 * 11 * 8
    with pytest.raises(ValueError, match="tgt_vocab must be src_vocab if shared, not 11"):
        EncoderDecoder(10, 11, 8, 2, 1, 12, shared=True)
    again = EncoderDecoder(11, 11, 8, 2, 2, 12, shared=True)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.src_embedding.weight, model.head.weight)


def test_dropout_of_the_encoder_decoder():
    model = EncoderDecoder(9, 9, 8, 2, 1, 12, dropout=0.5)
    src = torch.randint(9, (2, 5))
    assert not torch.equal(model(src, src), model(src, src))
    model.eval()
    assert torch.equal(model(src, src), model(src, src))


def test_embeddings_start_as_loud_as_positions():
    torch.manual_seed(0)
    for e in (Transformer(1000, 64, 2, 1, 8).encoder, EncoderDecoder(1000, 9, 64, 2, 1, 8).src_embedding):
        assert abs(e.weight.std().item() * 8 - 1) < 0.05


@pytest.mark.parametrize("make_block, norms", [(encoder_block, 2), (decoder_block, 3)])
def test_parameters_of_a_block(make_block, norms):
    D, F = 8, 12
    attention, feed_forward = 4 * (D * D + D), 2 * D * F + F + D
    expected = (norms - 1) * attention + feed_forward + norms * 2 * D
    assert sum(p.numel() for p in make_block(D, 2, F, 0.0).parameters()) == expected


@given(st.lists(st.lists(st.integers(3, 9), max_size=5), min_size=1, max_size=5))
def test_padding_and_shifting(rows):
    ids, real = pad_rows(rows, PAD)
    assert ids.shape == real.shape == (len(rows), max(map(len, rows)))
    assert [i[r].tolist() for i, r in zip(ids, real)] == rows and (ids[~real] == PAD).all()
    inputs, answers = teacher_forcing(iter(rows), BEGIN, END, PAD)
    assert inputs.shape == answers.shape == (len(rows), ids.shape[1] + 1)
    for x, y, row in zip(inputs.tolist(), answers.tolist(), rows):
        n = len(row)
        assert x == [BEGIN, *row] + [PAD] * (len(x) - n - 1)
        assert y == [*row, END] + [-100] * (len(y) - n - 1)
    counted = answers[:, :-1] >= 0
    follows = answers[:, 1:] >= 0
    assert torch.equal(inputs[:, 1:][follows], answers[:, :-1][counted & follows])


def test_what_torch_refuses():
    model = make()
    for call in (lambda: pad_rows([], PAD), lambda: teacher_forcing([], BEGIN, END, PAD),
                 lambda: model.greedy(torch.tensor([[3, 4]]), 0, BEGIN, END)):
        with pytest.raises((RuntimeError, ValueError), match="empty list"):
            call()


def test_cross_attention_weights():
    model = make()
    src, real = pad_rows([[3, 4, 5], [6]], PAD)
    tgt = torch.randint(11, (2, 4))
    before = model(src, tgt, real)
    weights = cross_attention_weights(model, src, tgt, real)
    assert weights.shape == (2, 2, 4, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 4))
    assert (weights[1, :, :, 1:] == 0).all()
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(src, tgt, real), before)
    # by hand: what the only block of a decoder gives its cross-attention
    model = make(n_layers=1)
    with torch.no_grad():
        block, memory = model.decoder[0], model.encode(src, real)
        x = model.positions(model.tgt_embedding(tgt) * math.sqrt(8))
        x = block.attention_norm(x + block.attention(x, causal=True))
        q, k = (f(y).unflatten(-1, (2, 4)).transpose(1, 2) for f, y in (
            (block.cross_attention.q_proj, x), (block.cross_attention.k_proj, memory)))
        expected = attention_weights(q, k, real[:, None, None, :])
    torch.testing.assert_close(cross_attention_weights(model, src, tgt, real), expected)
