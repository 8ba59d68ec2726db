"""Chapter 09: the neural bigram and the MLP language model."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from llm_book.neural_lm import MLPLM, BigramLM, fit, log_probs
from llm_book.ngram import NGramLM

ids_of = st.lists(st.integers(0, 6), min_size=1, max_size=30)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def loud(vocab_size=7, context=3, d_embed=4, d_hidden=5, **options):
    """An MLP whose logits differ visibly."""
    model = MLPLM(vocab_size, context, d_embed, d_hidden, generator=generator(), **options)
    torch.nn.init.normal_(model.output.weight, generator=generator(1))
    torch.nn.init.normal_(model.output.bias, generator=generator(2))
    return model.eval()


def by_hand(model, history):
    """The logits after `history`, one window at a time, from the weights alone."""
    n = model.context
    window = ([model.vocab_size] * n + history)[-n:]
    x = torch.cat([model.embedding.weight[i] for i in window])
    h = torch.tanh(model.hidden.weight @ x + model.hidden.bias)
    return model.output.weight @ h + model.output.bias


@given(ids_of, st.integers(1, 5))
def test_mlp_equals_one_window_at_a_time(ids, context):
    model = loud(context=context)
    logits, loss = model(torch.tensor([ids, ids[::-1]]))
    assert loss is None and logits.shape == (2, len(ids), 7)
    for row, sequence in zip(logits, (ids, ids[::-1])):
        expected = torch.stack([by_hand(model, sequence[:t + 1]) for t in range(len(ids))])
        torch.testing.assert_close(row, expected)


@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_the_window_sees_exactly_its_context(context, T, data):
    model, place = loud(context=context), data.draw(st.integers(0, T - 1))
    ids = torch.randint(7, (1, T), generator=generator(T))
    changed = ids.clone()
    changed[0, place] = (ids[0, place] + 1) % 7
    noticed = (model(ids)[0] != model(changed)[0]).any(-1)[0].nonzero().flatten().tolist()
    assert noticed == list(range(place, min(T, place + context)))


def test_losses_are_torchs():
    ids, targets = (torch.randint(7, (4, 9), generator=generator(i)) for i in (3, 4))
    targets[1, :5] = -100
    for model in (BigramLM(7), loud()):
        logits, loss = model(ids, targets)
        torch.testing.assert_close(loss, functional.cross_entropy(logits.mT, targets))


def test_gradients_are_torchs():
    model, ids = loud().double(), torch.randint(7, (3, 6), generator=generator(5))
    targets = torch.randint(7, (3, 6), generator=generator(6))
    model(ids, targets)[1].backward()
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    E, H, b, U, c = weights
    windows = torch.stack([functional.pad(ids, (3, 0), value=7)[:, t + 1:t + 4] for t in range(6)], 1)
    h = functional.linear(functional.embedding(windows, E).flatten(2), H, b).tanh()
    functional.cross_entropy(functional.linear(h, U, c).mT, targets).backward()
    for p, w in zip(model.parameters(), weights):
        torch.testing.assert_close(p.grad, w.grad)


@pytest.mark.parametrize("vocab_size", [2, 11, 256])
def test_first_loss_is_that_of_a_guess(vocab_size):
    x, y = (torch.randint(vocab_size, (8, 64), generator=generator(i)) for i in (0, 1))
    assert math.isclose(BigramLM(vocab_size)(x, y)[1].item(), math.log(vocab_size), rel_tol=1e-6)
    mlp = MLPLM(vocab_size, 8, 16, 128, generator=generator())
    assert abs(mlp(x, y)[1].item() - math.log(vocab_size)) < 0.02


def test_first_weights_follow_the_generator():
    models = [MLPLM(7, 3, 4, 5, generator=generator(seed)) for seed in (1, 1, 2)]
    same, other = (dict(model.named_parameters()) for model in models[1:])
    for name, p in models[0].named_parameters():
        assert torch.equal(p, same[name])
        assert name.endswith("bias") or not torch.equal(p, other[name])


def test_layout_is_out_in():
    shapes = {name: tuple(p.shape) for name, p in MLPLM(256, 8, 16, 192).named_parameters()}
    assert shapes == {"embedding.weight": (257, 16), "hidden.weight": (192, 128), "hidden.bias": (192,),
                      "output.weight": (256, 192), "output.bias": (256,)}


def test_dropout_acts_in_training_only():
    model, ids = loud(dropout=0.5), torch.zeros(1, 9, dtype=torch.int64)
    torch.testing.assert_close(model(ids)[0], loud()(ids)[0])
    assert not torch.equal(model.train()(ids)[0], model(ids)[0])
    before = log_probs(model, ids[0])
    assert model.training and torch.equal(before, log_probs(model, ids[0]))
    assert not model.eval().training and torch.equal(before, log_probs(model, ids[0]))
    assert not model.training


@given(ids_of, st.integers(1, 4), st.integers(1, 9))
def test_log_probs_price_each_token_once(ids, context, chunk):
    model = loud(context=context)
    found = log_probs(model, torch.tensor(ids), chunk)
    expected = [-math.log(7)] + [by_hand(model, ids[:t]).log_softmax(-1)[ids[t]].item()
                                 for t in range(1, len(ids))]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert not found.requires_grad


def test_a_bigram_with_counted_scores_prices_like_the_counted_one():
    ids = np.random.default_rng(0).integers(0, 7, 500)
    counted, model = NGramLM(2, 7, "laplace").fit(ids), BigramLM(7)
    model.table.weight.data = torch.tensor(np.stack([counted.probs([i]) for i in range(7)])).log().float()
    found = log_probs(model, torch.tensor(ids), 64).numpy()
    np.testing.assert_allclose(found[1:], counted.log_probs(ids)[1:], rtol=1e-5)


def test_descent_finds_the_counts():
    rng = np.random.default_rng(1)
    world = rng.dirichlet(np.ones(5), 5)
    ids = [0]
    for _ in range(4_000):
        ids.append(int(rng.choice(5, p=world[ids[-1]])))
    counts = np.zeros((5, 5))
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    model = BigramLM(5)
    losses = list(fit(model, ids, n_steps=400, batch_size=16, seq_len=64, max_lr=0.1, generator=generator()))
    found = model.table.weight.detach().softmax(-1).numpy()
    np.testing.assert_allclose(found, counts / counts.sum(1, keepdims=True), atol=0.03)
    share = counts / counts.sum(1, keepdims=True)
    minimum = -np.sum(counts * np.log(share)) / counts.sum()
    nats = -log_probs(model, torch.tensor(ids))[1:].mean().item()
    assert minimum - 1e-6 < nats < 1.01 * minimum and len(losses) == 400


def test_fit_is_a_plain_loop():
    """The same losses and weights as torch's own optimizer in a loop written out."""
    from llm_book.data import get_batch
    from llm_book.optim import cosine_schedule

    tokens = np.random.default_rng(2).integers(0, 7, 200)
    ours, theirs = (MLPLM(7, 3, 4, 5, generator=generator(3)) for _ in range(2))
    losses = list(fit(ours, tokens, n_steps=20, batch_size=4, seq_len=8, max_lr=1e-2, weight_decay=0.1,
                      generator=generator(4)))
    optimizer, draws = torch.optim.AdamW(theirs.parameters(), weight_decay=0.1), generator(4)
    for step, loss in enumerate(losses):
        optimizer.param_groups[0]["lr"] = cosine_schedule(step, 1e-2, 0.0, 10, 20)
        x, y = get_batch(tokens, 4, 8, "cpu", draws)
        expected = functional.cross_entropy(theirs(x)[0].mT, y)
        assert math.isclose(loss, expected.item(), rel_tol=1e-4)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
        assert p.grad is None


def test_fit_can_be_stopped_and_leaves_nothing_behind():
    model = MLPLM(7, 3, 4, 5, generator=generator())
    steps = fit(model, list(range(7)) * 9, n_steps=10, batch_size=2, seq_len=4, max_lr=1e-2,
                generator=generator())
    next(steps), next(steps)
    log_probs(model, torch.arange(7))  # looking in between changes nothing
    assert all(p.grad is None for p in model.parameters())
    assert len(list(fit(model, [1, 2, 3], n_steps=1, batch_size=1, seq_len=2, max_lr=1e-2,
                        generator=generator()))) == 1


@pytest.mark.parametrize("name, value", [("vocab_size", 0), ("context", 0), ("d_embed", -1), ("d_hidden", 0)])
def test_mlp_refuses_sizes(name, value):
    sizes = {"vocab_size": 7, "context": 3, "d_embed": 4, "d_hidden": 5, name: value}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not {value}"):
        MLPLM(**sizes)


@pytest.mark.parametrize("model", [BigramLM(7), loud()], ids=["bigram", "mlp"])
def test_models_refuse_ids(model):
    with pytest.raises(ValueError, match=r"from 0 to 6, not \(0, 7\)"):
        model(torch.tensor([[0, 7]]))  # 7 is the row that means "nothing here yet"
    with pytest.raises(ValueError, match=r"from 0 to 6, not \(-1"):
        model(torch.tensor([[-1, 3]]))
    with pytest.raises(ValueError, match="at least one token"):
        model(torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one token, not 0"):
        log_probs(model, torch.zeros(0, dtype=torch.int64))


def test_log_probs_restores_the_training_mode_after_an_error():
    model = BigramLM(7).train()
    with pytest.raises(ValueError, match="from 0 to 6"):
        log_probs(model, torch.tensor([0, 9, 1]))
    assert model.training
