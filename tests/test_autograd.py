"""Chapter 05: Value against torch on random expressions, and against finite differences."""
import gc
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from llm_book.autograd import Value, draw, topological_order

numbers = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))
UNARY = {"neg": lambda x: -x, "exp": lambda x: x.exp(), "tanh": lambda x: x.tanh(),
         "relu": lambda x: x.relu(), "square": lambda x: x**2, "cube": lambda x: x**3,
         "add": lambda x: 1.5 + x, "rsub": lambda x: 2 - x, "rmul": lambda x: -0.5 * x,
         "log": lambda x: (x * x + 0.5).log(), "rdiv": lambda x: 2 / (x * x + 0.5),
         "root": lambda x: (x * x + 0.5) ** 0.5, "rpow": lambda x: 1.5**x,
         "inverse": lambda x: (x * x + 0.5) ** -1}
BINARY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
          "/": lambda a, b: a / (b * b + 0.5), "**": lambda a, b: (a * a + 0.5) ** b}
steps = st.lists(st.tuples(st.sampled_from([*UNARY, *BINARY]), st.integers(0, 99),
                           st.integers(0, 99)), min_size=1, max_size=12)


def evaluate(leaves, program):
    """Run a random program; nodes are shared freely, because every step may use any earlier one."""
    made = list(leaves)
    for name, i, j in program:
        a, b = made[i % len(made)], made[j % len(made)]
        made.append(UNARY[name](a) if name in UNARY else BINARY[name](a, b))
    total = made[0]
    for value in made[1:]:
        total = total + value.tanh()
    return total


@given(st.lists(numbers, min_size=1, max_size=4), steps, st.integers(1, 3))
def test_random_expressions_equal_torch(data, program, calls):
    ours = [Value(x) for x in data]
    theirs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in data]
    try:
        result = evaluate(ours, program)
    except ArithmeticError:
        assume(False)
    expected = evaluate(theirs, program)
    assume(abs(result.data) < 1e6)
    assert result.data == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)
    for _ in range(calls):
        result.backward()
        expected.backward(retain_graph=True)
    for value, tensor in zip(ours, theirs):
        slope = 0.0 if tensor.grad is None else tensor.grad.item()
        assert value.grad == pytest.approx(slope, rel=1e-6, abs=1e-6)


@given(st.lists(numbers, min_size=2, max_size=3))
def test_finite_differences(data):
    def f(values):
        a, b = values[0], values[-1]
        return (a * b + a.exp()).tanh() / (b * b + 1) + (a - b) ** 2

    values = [Value(x) for x in data]
    f(values).backward()
    for i, value in enumerate(values):
        above, below = (f([Value(x + h * (i == j)) for j, x in enumerate(data)]).data
                        for h in (1e-6, -1e-6))
        assert value.grad == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-5)


def test_corners_as_in_torch():
    for f in (lambda x: x.relu(), lambda x: x**0, lambda x: x**1, lambda x: x**2):
        x, t = Value(0.0), torch.zeros((), dtype=torch.float64, requires_grad=True)
        f(x).backward()
        f(t).backward()
        assert x.grad == t.grad.item()


def test_a_very_deep_chain_and_its_end():
    x = y = Value(1.0)
    for _ in range(100_000):
        y = y + x
    y.backward()
    assert x.grad == 100_001 and len(topological_order(y)) == 100_001
    del y
    gc.collect()


def test_order_puts_inputs_first():
    a = Value(2.0)
    b = a * a
    root = b + a * b
    order = topological_order(root)
    assert order[-1] is root and len(set(map(id, order))) == len(order)
    for node in order:
        assert all(order.index(source) < order.index(node) for source, _ in node.edges)


def test_comparisons_and_sets():
    a, b = Value(2.0), Value(2.0)
    assert a == b and a == 2 and a != 3 and a < 3 and a <= b and 1 < a and a >= 2 and not a > b
    assert a != "2" and len({a, b}) == 2
    assert sorted([Value(3.0), Value(1.0)])[0] == 1
    assert "2" in repr(a) and "grad=0" in repr(a)


FINITE = "must be finite and have finite slopes"


@pytest.mark.parametrize("wrong, error, message", [
    (lambda: Value("2"), TypeError, "data must be a real number"),
    (lambda: Value(1.0) + None, TypeError, "real number"),
    (lambda: Value(1) / 0, ZeroDivisionError, None),
    (lambda: 1 / Value(0), ZeroDivisionError, None),
    (lambda: Value(0.0).log(), ValueError, None),
    (lambda: Value(-1.0).log(), ValueError, None),
    (lambda: Value(1000.0).exp(), OverflowError, None),
    (lambda: Value(1e200) ** 2, OverflowError, None),
    (lambda: Value(-2.0) ** 0.5, TypeError, "real number"),
    (lambda: Value(-2.0) ** Value(2.0), ValueError, None),
    (lambda: Value(0.0) ** -1, ZeroDivisionError, None),
    (lambda: Value(0.0) ** 0.5, ZeroDivisionError, None),
    (lambda: Value(0.0) ** Value(0.0), ValueError, None),
    (lambda: Value(0.0) ** Value(-1.0), ZeroDivisionError, None),
    (lambda: 0.0 ** Value(0.0), ValueError, None),
    # Python's floats overflow without an error in sums, products and quotients
    (lambda: Value(1e308) * 10, OverflowError, FINITE),
    (lambda: Value(1e308) + 1e308, OverflowError, FINITE),
    (lambda: -1e308 - Value(1e308), OverflowError, FINITE),
    (lambda: Value(1.0) / Value(1e-200), OverflowError, FINITE),
    (lambda: Value(1.0) / 1e-310, OverflowError, FINITE),
    (lambda: Value(1e-310).log(), OverflowError, FINITE),
    (lambda: Value(1e155) ** Value(1.98), OverflowError, FINITE),
    (lambda: Value(math.inf), OverflowError, FINITE),
    (lambda: Value(1.0) * math.nan, OverflowError, FINITE),
])
def test_refuses(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


@given(st.floats(), st.floats(), st.sampled_from([*UNARY, *BINARY, "a/b", "a**b", "a**2.5", "log"]))
def test_results_and_slopes_are_finite_or_refused(x, y, name):
    more = {"a/b": lambda a, b: a / b, "a**b": lambda a, b: a**b, "a**2.5": lambda a, b: a**2.5,
            "log": lambda a, b: a.log(), **BINARY, **{n: lambda a, b, f=f: f(a) for n, f in UNARY.items()}}
    try:
        result = more[name](Value(x), Value(y))
    except (ArithmeticError, ValueError, TypeError):
        return
    for node in topological_order(result):
        assert math.isfinite(node.data) and all(math.isfinite(slope) for _, slope in node.edges)


def test_draw_shows_every_node():
    a = Value(2.0, "a")
    root = (a * a).tanh()
    root.backward()
    ax = draw(root)
    shown = [text.get_text() for text in ax.texts]
    assert {"a", "×", "tanh", "2"} <= set(shown) and f"{a.grad:.4g}" in shown
    plt.close("all")
    for _ in range(60):
        root = root + 1
    with pytest.raises(ValueError, match="at most 60 nodes"):
        draw(root)


def test_log_softmax_gives_believed_minus_happened():
    z = [Value(x) for x in (0.3, -1.2, 2.0)]
    loss = -(z[1].exp() / sum(x.exp() for x in z)).log()
    loss.backward()
    t = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    assert [x.grad for x in z] == pytest.approx((t.softmax(0) - torch.tensor([0, 1, 0])).tolist())
    assert loss.data == pytest.approx(-t.log_softmax(0)[1].item()) and math.isfinite(loss.data)
