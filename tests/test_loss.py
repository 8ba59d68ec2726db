"""Chapter 04: entropy, softmax and cross-entropy against torch."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llm_book.loss import (
    bits_per_byte,
    cross_entropy,
    entropy,
    kl_divergence,
    log_softmax,
    perplexity,
    softmax,
)

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
close = torch.testing.assert_close


def randn(*shape, seed=0, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@given(shapes, st.integers(0, 99), st.floats(0, 1e4))
def test_softmax_equals_torch(shape, seed, scale):
    x = randn(*shape, seed=seed, scale=scale)
    for dim in range(-1, len(shape)):
        close(softmax(x, dim), x.softmax(dim))
        close(log_softmax(x, dim), x.log_softmax(dim))
    assert torch.isfinite(log_softmax(x)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_softmax_keeps_dtype_and_does_not_overflow(dtype):
    x = torch.tensor([[6e4, 0, -6e4], [1.0, 2.0, 3.0]], dtype=dtype)
    assert softmax(x).dtype == log_softmax(x).dtype == dtype
    close(softmax(x), x.softmax(-1))
    assert torch.isfinite(log_softmax(x)[1]).all() and softmax(x)[0].tolist() == [1, 0, 0]
    many = torch.zeros(50_000, dtype=dtype)
    assert log_softmax(many)[0].item() == pytest.approx(-math.log(50_000), rel=0.005)


def test_softmax_with_minus_infinity():
    x = torch.tensor([0.0, -math.inf, 0.0])
    assert softmax(x).tolist() == [0.5, 0, 0.5] and log_softmax(x)[1] == -math.inf


@given(shapes, st.integers(0, 99), st.sampled_from(["mean", "sum", "none"]), st.sampled_from([0, 0.1, 1]),
       st.sampled_from([-100, 0]))
def test_cross_entropy_equals_torch_in_value_and_gradient(shape, seed, reduction, smoothing, ignore):
    z = randn(*shape, 7, seed=seed, dtype=torch.float64).requires_grad_()
    y = torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(seed))
    y.view(-1)[::3] = ignore
    options = dict(ignore_index=ignore, label_smoothing=smoothing, reduction=reduction)
    if reduction == "mean" and (y == ignore).all():
        with pytest.raises(ValueError, match="not all"):
            cross_entropy(z, y, **options)
        return
    ours = cross_entropy(z, y, **options)
    theirs = F.cross_entropy(z.reshape(-1, 7), y.reshape(-1), **options).reshape(ours.shape)
    close(ours, theirs)
    weights = randn(ours.numel(), seed=1, dtype=torch.float64).reshape(ours.shape)
    close(*(torch.autograd.grad((loss * weights).sum(), z, retain_graph=True)[0]
            for loss in (ours, theirs)))


def test_gradient_by_finite_differences():
    z = randn(3, 4, dtype=torch.float64).requires_grad_()
    y = torch.tensor([1, -100, 3])
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, y, label_smoothing=0.2), (z,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropy_in_half_precision(dtype):
    z, y = randn(64, 1000, dtype=dtype).requires_grad_(), torch.arange(64)
    loss = cross_entropy(z, y)
    assert loss.dtype == torch.float32
    close(loss, F.cross_entropy(z.float(), y))
    loss.backward()
    assert z.grad.dtype == dtype and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("targets, options, message", [
    (torch.zeros(3, dtype=torch.long), {}, r"shape \(2,\).*not \(3,\)"),
    (torch.zeros(1, dtype=torch.long), {}, r"shape \(2,\).*not \(1,\)"),
    (torch.tensor([0, 5]), {}, "index 5 is out of bounds"),  # these two by torch
    (torch.tensor([0, -1]), {}, "index -1 is out of bounds"),
    (torch.tensor([-100, -100]), {}, "targets must be not all -100"),
    (torch.tensor([0.0, 1.0]), {}, "targets must be integers"),
    (torch.tensor([0, 1]), {"reduction": "median"}, "reduction must"),
    (torch.tensor([0, 1]), {"label_smoothing": 1.5}, "label_smoothing must"),
    (torch.tensor([0, 1]), {"label_smoothing": math.nan}, "label_smoothing must"),
])
def test_cross_entropy_refuses(targets, options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        cross_entropy(randn(2, 5), targets, **options)


@pytest.mark.parametrize("V, dtype", [(200, torch.uint8), (256, torch.uint8), (128, torch.int8),
                                      (40_000, torch.int16), (40_000, torch.int32)])
def test_targets_of_every_integer_type_count_alike(V, dtype):
    y = torch.arange(0, min(V, torch.iinfo(dtype).max + 1), max(1, V // 300))
    y = torch.cat([y, torch.tensor([V - 1, 156]).clamp(max=torch.iinfo(dtype).max)])  # 156 - 256 = -100
    z = randn(len(y), V)
    for ignore in (-100, 3):
        y[0] = ignore if dtype.is_signed else 0
        expected = F.cross_entropy(z, y, ignore_index=ignore, reduction="none")
        close(cross_entropy(z, y.to(dtype), ignore_index=ignore, reduction="none"), expected)


def test_all_ignored_is_fine_without_a_mean():
    assert cross_entropy(randn(2, 5), torch.tensor([-100, -100]), reduction="sum") == 0


@given(st.integers(2, 9), st.integers(0, 99))
def test_divergence_equals_torch_and_is_never_negative(n, seed):
    p, q = (randn(5, n, seed=s, dtype=torch.float64, scale=1).softmax(-1) for s in (seed, seed + 1))
    close(entropy(p), torch.distributions.Categorical(p).entropy())
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(p), torch.distributions.Categorical(q))
    close(kl_divergence(p, q), expected, atol=1e-6, rtol=1e-4)
    assert (kl_divergence(p, q) >= -1e-6).all() and (kl_divergence(p, p).abs() < 1e-6).all()


def test_zeros():
    certain, even = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    assert entropy(certain) == 0 and kl_divergence(even, certain) == math.inf
    assert kl_divergence(certain, even).item() == pytest.approx(math.log(2))


def test_units():
    assert perplexity(math.log(7)) == pytest.approx(7) and perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan)) and perplexity(math.inf) == math.inf
    assert perplexity(709.5) == pytest.approx(math.exp(709.5)) and perplexity(-math.inf) == 0
    for f in (softmax, log_softmax):
        with pytest.raises(ValueError, match="floating-point"):
            f(torch.tensor([1, 2]))
    assert bits_per_byte(math.log(2) * 16, 4) == pytest.approx(4)
    for nothing in (0, -1):
        with pytest.raises(ValueError, match="n_bytes must be at least 1"):
            bits_per_byte(1.0, nothing)
