"""Chapter 06: every operation against torch, in values and gradients, for random shapes."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llm_book import tensor as t
from llm_book.tensor import Tensor, grad_check, no_grad

sizes = st.integers(0, 4)
shapes = st.lists(sizes, max_size=4).map(tuple)
seeds = st.integers(0, 999)


def arrays(seed, *shapes, positive=False, dtype=np.float64):
    rng = np.random.default_rng(seed)
    made = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    return [np.abs(x) + dtype(0.5) for x in made] if positive else made


def compare(ours, theirs, *inputs, rtol=1e-9, atol=1e-10):
    """Values and gradients of two functions of the same arrays, with random weights behind."""
    a = [Tensor(x.copy(), requires_grad=True) for x in inputs]
    b = [torch.tensor(x, requires_grad=True) for x in inputs]
    y, z = ours(*a), theirs(*b)
    assert y.shape == tuple(z.shape) and y.dtype == z.detach().numpy().dtype
    np.testing.assert_allclose(y.data, z.detach().numpy(), rtol=rtol, atol=atol)
    weights = np.random.default_rng(1).normal(size=y.shape).astype(y.dtype)
    y.backward(weights)
    z.backward(torch.tensor(weights))
    for mine, other in zip(a, b):
        expected = np.zeros(mine.shape) if other.grad is None else other.grad.numpy()
        found = np.zeros(mine.shape) if mine.grad is None else mine.grad
        assert found.shape == mine.shape and found.dtype == mine.dtype
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


BINARY = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b,
          "divide": lambda a, b: a / b, "power": lambda a, b: a**b}


@given(st.sampled_from([*BINARY]), shapes, seeds, st.data())
def test_binary_with_broadcasting(name, shape, seed, data):
    cut = data.draw(st.integers(0, len(shape)))
    other = tuple(1 if data.draw(st.booleans()) else n for n in shape[cut:])
    a, b = arrays(seed, shape, other, positive=True)
    for pair in ((a, b), (b, a)):
        compare(BINARY[name], BINARY[name], *pair)


@pytest.mark.parametrize("f", [lambda x: 2 + x, lambda x: 2 - x, lambda x: x - 2, lambda x: 2 * x,
                               lambda x: x / 4, lambda x: 2 / x, lambda x: x**2, lambda x: x**-0.5,
                               lambda x: 2**x, lambda x: -x])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_plain_numbers_keep_the_dtype(f, dtype):
    compare(f, f, *arrays(0, (2, 3), positive=True, dtype=dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["exp", "log", "sqrt", "tanh", "relu"])
@given(shape=shapes, seed=seeds)
def test_elementwise(name, shape, seed):
    (x,) = arrays(seed, shape, positive=name in ("log", "sqrt"))
    compare(lambda a: getattr(a, name)(), lambda b: getattr(b, name)(), x)


@given(shapes, seeds)
def test_gelu(shape, seed):
    compare(lambda a: a.gelu(), lambda b: F.gelu(b, approximate="tanh"), *arrays(seed, shape))


MATRICES = [((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((2, 3), (3, 4)), ((5, 2, 3), (3, 4)),
            ((5, 2, 3), (5, 3, 4)), ((2, 3), (5, 3, 4)), ((5, 1, 2, 3), (6, 3, 4)), ((5, 2, 3), (3,)),
            ((3,), (5, 3, 2)), ((0, 3), (3, 4)), ((2, 0), (0, 4)), ((0, 2, 3), (0, 3, 1))]


@pytest.mark.parametrize("a, b", MATRICES)
def test_matmul(a, b):
    compare(lambda x, y: x @ y, lambda x, y: x @ y, *arrays(0, a, b))


@pytest.mark.parametrize("name", ["sum", "mean"])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (1,)])
def test_reductions(name, keepdims, axis):
    dim = tuple(range(3)) if axis is None else axis
    compare(lambda a: getattr(a, name)(axis, keepdims),
            lambda b: getattr(b, name)(dim=dim, keepdim=keepdims), *arrays(0, (2, 3, 4)))


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1)])
def test_max_shares_the_gradient_among_ties(axis):
    x = np.array([[1.0, 3, 3], [3, 0, 3]])
    dim = (0, 1) if axis is None else axis
    compare(lambda a: a.max(axis), lambda b: b.amax(dim), x)
    compare(lambda a: a.max(axis, keepdims=True), lambda b: b.amax(dim, keepdim=True), x)


def test_shapes():
    (x,) = arrays(0, (2, 3, 4))
    compare(lambda a: a.reshape(6, -1), lambda b: b.reshape(6, -1), x)
    compare(lambda a: a.transpose(2, 0, 1), lambda b: b.permute(2, 0, 1), x)
    compare(lambda a: a.swapaxes(0, 2), lambda b: b.swapaxes(0, 2), x)
    compare(lambda a: a.mT, lambda b: b.mT, x)
    compare(lambda a: a.reshape(6, 4).T, lambda b: b.reshape(6, 4).T, x)


@pytest.mark.parametrize("index", [0, -1, slice(1, None), (slice(None), 2), (..., None, 1),
                                   [2, 0, 2], np.array([[0, 2], [2, 2]]),
                                   (np.array([0, 1, 0]), np.array([1, 1, 1])), np.array([], int)])
def test_indexing_adds_up_repeated_places(index):
    def torch_index(b):
        return b[torch.tensor(index) if isinstance(index, np.ndarray) else index]
    compare(lambda a: a[index], torch_index, *arrays(0, (3, 3, 2)))


@given(seeds, st.integers(-3, 2), st.integers(1, 4))
def test_softmax(seed, axis, n):
    (x,) = arrays(seed, (2, n, 3))
    compare(lambda a: t.softmax(a, axis), lambda b: b.softmax(axis), 50 * x, atol=1e-8)


def test_masking():
    a, b = arrays(0, (2, 3), (1, 3))
    mask = np.array([[True, False, True], [False, True, False]])
    compare(lambda x: t.masked_fill(x, mask, 5), lambda x: x.masked_fill(torch.tensor(mask), 5), b)
    compare(lambda x: t.softmax(t.masked_fill(x, mask, -math.inf)),
            lambda x: x.masked_fill(torch.tensor(mask), -math.inf).softmax(-1), a)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), seeds)
def test_cross_entropy(shape, seed):
    (logits,) = arrays(seed, (*shape, 5))
    targets = np.random.default_rng(seed).integers(0, 5, shape)
    targets.reshape(-1)[1::2] = -100
    compare(lambda z: t.cross_entropy(z, targets),
            lambda z: F.cross_entropy(z.reshape(-1, 5), torch.tensor(targets).reshape(-1)), logits)


@given(st.lists(st.integers(1, 3), max_size=2).map(tuple), st.integers(1, 6), seeds)
def test_layer_norm(shape, D, seed):
    x, w, b = arrays(seed, (*shape, D), (D,), (D,))
    compare(lambda x, w, b: t.layer_norm(x, w, b), lambda x, w, b: F.layer_norm(x, (D,), w, b),
            x, w, b, rtol=1e-6, atol=1e-7)


@given(st.integers(1, 3), seeds)
def test_shared_nodes_and_repeated_walks(calls, seed):
    data = arrays(seed, (2, 3), (3, 3))
    ours, theirs = ([make(x) for x in data] for make in (
        lambda x: Tensor(x, requires_grad=True), lambda x: torch.tensor(x, requires_grad=True)))

    def f(a, b):
        shared = (a @ b).tanh()
        return (shared * shared + a).sum()

    y, z = f(*ours), f(*theirs)
    for _ in range(calls):
        y.backward(retain_graph=True)
        z.backward(retain_graph=True)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a.grad, b.grad.numpy())


def test_a_released_graph_says_so():
    x = Tensor(np.ones(2), requires_grad=True)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="released"):
        y.backward()


def test_deep_graphs_do_not_recurse():
    x = y = Tensor(np.ones(1), requires_grad=True)
    for _ in range(20_000):
        y = y + x
    y.backward()
    assert x.grad.item() == 20_001


def test_no_grad_records_nothing():
    x = Tensor(np.ones(2), requires_grad=True)
    with no_grad():
        y = x * 2
    assert not y.requires_grad and (x * 2).requires_grad
    with pytest.raises(ValueError, match="requires_grad"):
        y.sum().backward()


def test_grad_check_finds_a_wrong_slope():
    (x,) = arrays(0, (2, 2))
    x = Tensor(x, requires_grad=True)
    grad_check(lambda x: (x * x).sum(), x)

    def wrong(x):
        return t.traced(x.data**2, (x, lambda g: g * x.data))

    with pytest.raises(AssertionError, match=r"input 0 at \("):
        grad_check(wrong, x)
    with pytest.raises(ValueError, match="float64"):
        grad_check(lambda x: x, Tensor(np.ones(1, np.float32), requires_grad=True))
    assert x.grad is None


@pytest.mark.parametrize("wrong, message", [
    (lambda: Tensor("a"), "data must be real numbers"),
    (lambda: Tensor([1, 2], requires_grad=True), "floats"),
    (lambda: Tensor([1.0, 2.0], requires_grad=True).backward(), "gradient must be given"),
    (lambda: Tensor([1.0], requires_grad=True).backward([1.0, 2.0]), "gradient must be of shape"),
    (lambda: t.cross_entropy(Tensor(np.ones((2, 3))), np.array([0, -1])), "targets must be from 0 to 2"),
    (lambda: t.cross_entropy(Tensor(np.ones((2, 3))), np.array([0, 3])), "out of bounds"),
    (lambda: t.cross_entropy(Tensor(np.ones((2, 3))), np.array([-100, -100])), "not all -100"),
    (lambda: t.cross_entropy(Tensor(np.ones((2, 2, 3))), np.zeros((4, 1), int)), None),
    (lambda: t.masked_fill(Tensor(np.ones(2)), np.array([True, False]), None), None),
])
def test_refuses(wrong, message):
    with pytest.raises((ValueError, IndexError, TypeError), match=message):
        wrong()


@pytest.mark.parametrize("other", [None, "2", 1j, [None, None], np.array([1j, 2j]), object(), b"2"])
def test_operators_refuse_what_is_no_number(other):
    x = Tensor(np.ones(2), requires_grad=True)
    for f in (*BINARY.values(), lambda a, b: a @ b):
        for pair in ((x, other), (other, x)):
            with pytest.raises(TypeError):
                f(*pair)


def test_functions_of_numpy_that_have_no_vjp_are_refused():
    x = Tensor(np.ones(2), requires_grad=True)
    for wrong in (lambda: np.sin(x), lambda: x < 1, lambda: np.add.reduce(x), lambda: abs(x),
                  lambda: np.add(x, 1, out=np.zeros(2)), lambda: x // 2):
        with pytest.raises(TypeError):
            wrong()
    y = x
    y += 1  # a new tensor, as y = y + 1 is
    assert x.data.tolist() == [1, 1] and y.data.tolist() == [2, 2] and y.edges


def test_the_table_can_be_extended(monkeypatch):
    monkeypatch.setitem(t.VJPS, np.sin, lambda y, x: (lambda g: g * np.cos(x),))
    compare(lambda x: np.sin(x) * 2, lambda x: x.sin() * 2, *arrays(0, (2, 3)))


def half(x, **options):
    return Tensor(np.asarray(x, np.float16), **options)


def halves(ours, theirs, *inputs, rtol=2e-3, atol=2e-3):
    """Values and gradients in float16 beside torch's, rounded once from float32."""
    a = [half(x, requires_grad=True) for x in inputs]
    b = [torch.tensor(x.data, dtype=torch.float32, requires_grad=True) for x in a]
    y, z = ours(*a), theirs(*b)
    np.testing.assert_allclose(y.data, z.detach().numpy(), rtol=rtol, atol=atol)
    weights = np.random.default_rng(1).normal(size=y.shape).astype(np.float16)
    y.backward(weights)
    z.backward(torch.tensor(weights, dtype=torch.float32))
    for mine, other in zip(a, b):
        assert mine.grad.dtype == np.float16 and np.isfinite(mine.grad).all()
        np.testing.assert_allclose(mine.grad, other.grad.numpy(), rtol=rtol, atol=atol)


def test_sums_of_half_precision():
    large = np.array([[300.0, -300, 299, -299]])
    w, b = np.full(4, 1.5), np.full(4, 0.25)
    halves(lambda x, w, b: t.layer_norm(x, w, b), lambda x, w, b: F.layer_norm(x, (4,), w, b), large, w, b)
    halves(lambda x: x.gelu(), lambda x: F.gelu(x, approximate="tanh"), large)
    many = np.ones(70_000)
    halves(lambda x: x.mean(), lambda x: x.mean(), many)
    halves(lambda x: t.softmax(x), lambda x: x.softmax(-1), 0 * many, atol=1e-6)
    halves(lambda x: x.max(), lambda x: x.amax(), many, atol=1e-6)
    halves(lambda x: x.sum(), lambda x: x.sum(), many / 8)
    halves(lambda x, b: (x * b).mean(), lambda x, b: (x * b).mean(), many, np.ones(1))
    halves(lambda x, b: x * b, lambda x, b: x * b, many / 128, np.ones(1), rtol=5e-3, atol=1)
    halves(lambda x: x[np.zeros(5_000, int)] / 16, lambda x: x[torch.zeros(5_000, dtype=int)] / 16,
           np.ones(1), atol=0.5)
    targets = np.array([0, -100, 7])
    halves(lambda z: t.cross_entropy(z, targets),
           lambda z: F.cross_entropy(z, torch.tensor(targets)), np.zeros((3, 70_000)), atol=1e-6)
    assert t.softmax(half(np.zeros(70_000))).dtype == half(many).mean().dtype == np.float16


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64])
def test_targets_of_every_integer_type(dtype):
    targets = np.array([156, 0, 199]).astype(dtype)  # 156 - 256 = -100
    (logits,) = arrays(0, (3, 200))
    compare(lambda z: t.cross_entropy(z, targets),
            lambda z: F.cross_entropy(z, torch.tensor(targets.astype(np.int64))), logits)
