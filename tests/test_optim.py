"""Chapter 07: every optimizer against torch's own over 100 steps; schedules, clipping, refusals."""
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed
from torch.distributed.tensor import Shard, distribute_tensor

from llm_book import optim
from llm_book.optim import (
    SGD,
    Adam,
    AdamW,
    Muon,
    RMSProp,
    adamw_step,
    clip_grad_norm,
    orthogonalise,
)

SHAPES = [(7, 5), (5,), (), (2, 3, 4), (0, 3), (600, 500)]  # the last is cut into pieces
needs_torch_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch below 2.9")

PAIRS = [
    (SGD, "SGD", {}), (SGD, "SGD", {"momentum": 0.9}),
    (SGD, "SGD", {"lr": 0.01, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    (SGD, "SGD", {"weight_decay": 0.5}),
    (RMSProp, "RMSprop", {}), (RMSProp, "RMSprop", {"lr": 1e-3, "alpha": 0.9, "eps": 1e-4}),
    (Adam, "Adam", {}), (Adam, "Adam", {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-3}),
    (Adam, "Adam", {"weight_decay": 0.1}),
    (AdamW, "AdamW", {}), (AdamW, "AdamW", {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6}),
    (AdamW, "AdamW", {"weight_decay": 0.0}), (AdamW, "AdamW", {"weight_decay": 0.3}),
    (AdamW, "AdamW", {"betas": (0.0, 0.0)}),
]
MUON = [{}, {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.0}, {"momentum": 0.0}]


def parameters(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def refuses(method, argument, message):
    """An optimizer's method raises ValueError, and the optimizer is as it was."""
    optimizer = method.__self__
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        method(argument)
    after = optimizer.state_dict()
    same(after["state"], before["state"], atol=0)
    assert after["param_groups"] == before["param_groups"]


def give_gradients(ps, step, absent=()):
    """The same gradients for the same step; none for the places in `absent`."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(ps):
        scale = 10.0 ** (i - 2)
        grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float32)
        p.grad = None if i in absent else grad.to(p.dtype)


def train(optimizer, ps, n_steps, absent=lambda step: (), start=0):
    for step in range(start, start + n_steps):
        give_gradients(ps, step, absent(step))
        optimizer.step()


def same(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("ours, theirs, options", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hundred_steps_as_torch(ours, theirs, options, dtype):
    a, b = parameters(dtype=dtype), parameters(dtype=dtype)
    mine, other = ours(a, **options), getattr(torch.optim, theirs)(b, **options)
    for step in range(100):
        train(mine, a, 1, start=step)
        train(other, b, 1, start=step)
        same(a, b)
    assert not torch.equal(a[0], parameters(dtype=dtype)[0])


@pytest.mark.parametrize("options", MUON)
@pytest.mark.parametrize("shape", [(6, 6), (12, 4), (4, 12), (1, 5), (5, 1)])
@needs_torch_muon
def test_muon_as_torch(options, shape):
    a, b = parameters([shape, (3, 3)]), parameters([shape, (3, 3)])
    mine, other = Muon(a, **options), torch.optim.Muon(b, **options)
    train(mine, a, 100)
    train(other, b, 100)
    length = 100 * options.get("lr", 1e-3)  # of the way; bfloat16 has 8 bits, which may round apart
    same(a, b, atol=length * 2**-8)


def test_defaults_are_those_of_torch():
    for ours, theirs in ((SGD, "SGD"), (RMSProp, "RMSprop"), (Adam, "Adam"), (AdamW, "AdamW"),
                         (Muon, "Muon")):
        if hasattr(torch.optim, theirs):
            a, b = ours(parameters([(2, 2)])), getattr(torch.optim, theirs)(parameters([(2, 2)]))
            newer = {"decoupled_weight_decay": a.defaults.get("decoupled_weight_decay")}  # 2.7 on
            assert a.defaults == {name: (newer | b.defaults)[name] for name in a.defaults}


@given(st.integers(0, 99), st.floats(1e-5, 0.1), st.floats(0, 0.99), st.floats(0, 0.999),
       st.floats(0, 1), st.sampled_from([(), (3,), (2, 3)]))
def test_plain_step_on_arrays_and_tensors(seed, lr, beta1, beta2, decay, shape):
    options = {"lr": lr, "betas": (beta1, beta2), "weight_decay": decay, "eps": 1e-6}
    rng = np.random.default_rng(seed)
    start = rng.normal(size=shape)
    array, mean, square = np.array(start), np.zeros(shape), np.zeros(shape)
    leaf = torch.tensor(start, requires_grad=True)
    state = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    peer = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.AdamW([peer], **options)
    for step in range(1, 6):
        g = np.asarray(rng.normal(size=shape))
        adamw_step(array, g, mean, square, step, **options)
        adamw_step(leaf, torch.tensor(g), *state, step, **options)
        peer.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(array, peer.detach().numpy(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(leaf, peer, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mean, optimizer.state[peer]["exp_avg"].numpy(), atol=1e-12)
    np.testing.assert_allclose(square, optimizer.state[peer]["exp_avg_sq"].numpy(), atol=1e-12)


def test_plain_step_keeps_float32_and_counts_from_one():
    arrays = [np.ones(3, np.float32) for _ in range(4)]
    adamw_step(*arrays, 1, lr=0.1)
    assert all(x.dtype == np.float32 for x in arrays)
    with pytest.raises(ZeroDivisionError), np.errstate(divide="ignore"):
        adamw_step(*arrays, 0, lr=0.1)


def test_groups_have_options_of_their_own():
    for ours, theirs in ((AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD)):
        made = []
        for kind in (ours, theirs):
            ps = parameters()
            optimizer = kind([{"params": ps[:2], "lr": 0.1}, {"params": ps[2:]}], lr=0.01,
                             weight_decay=0.2)
            train(optimizer, ps, 5)
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
            train(optimizer, ps, 5, start=5)
            made.append(ps)
        same(*made)


def test_parameters_without_gradient_wait_and_count_their_own_steps():
    def absent(step):
        return () if step % 3 else (0, 5)

    for ours, theirs in ((AdamW, torch.optim.AdamW), (RMSProp, torch.optim.RMSprop)):
        a, b = parameters(), parameters()
        mine, other = ours(a), theirs(b)
        train(mine, a, 20, absent)
        train(other, b, 20, absent)
        same(a, b)
        assert mine.state[a[0]]["step"] == other.state[b[0]]["step"] == 13


def test_any_strides():
    def transposed():
        base = parameters([(600, 500), (6, 7)])
        return [p.detach().T.requires_grad_() for p in base]

    a, b = transposed(), transposed()
    train(AdamW(a), a, 5)
    train(torch.optim.AdamW(b), b, 5)
    same(a, b)


@pytest.mark.parametrize("ours, theirs, options", [
    (SGD, "SGD", {"momentum": 0.9}), (SGD, "SGD", {}), (RMSProp, "RMSprop", {}),
    (Adam, "Adam", {"weight_decay": 0.1}), (AdamW, "AdamW", {}), (Muon, "Muon", {})])
def test_state_travels_between_ours_and_torch(ours, theirs, options, tmp_path):
    if not hasattr(torch.optim, theirs):
        pytest.skip("torch below 2.9")
    theirs = getattr(torch.optim, theirs)
    shapes = [(7, 5), (600, 500)] if ours is Muon else SHAPES
    through = parameters(shapes)
    train(ours(through, **options), through, 20)
    for first, second in (ours, ours), (theirs, ours), (ours, theirs):
        ps = parameters(shapes)
        before = first(ps, **options)
        train(before, ps, 10)
        torch.save(before.state_dict(), tmp_path / "state")
        after = second(ps, lr=123.0)  # overwritten by what is loaded
        after.load_state_dict(torch.load(tmp_path / "state"))
        train(after, ps, 10, start=10)
        same(ps, through)


def test_state_of_an_option_we_lack_is_refused():
    ps = parameters([(3, 2)])
    for kind, theirs, option in ((AdamW, "AdamW", {"amsgrad": True}),
                                 (Adam, "Adam", {"maximize": True}),
                                 (SGD, "SGD", {"momentum": 0.9, "dampening": 0.5}),
                                 (RMSProp, "RMSprop", {"momentum": 0.9}),
                                 (RMSProp, "RMSprop", {"weight_decay": 0.1}),
                                 (RMSProp, "RMSprop", {"centered": True}),
                                 (Muon, "Muon", {"nesterov": False}),
                                 (Muon, "Muon", {"ns_coefficients": (1.5, -0.5, 0.0)}),
                                 (Muon, "Muon", {"adjust_lr_fn": "match_rms_adamw"})):
        if hasattr(torch.optim, theirs):
            ours, other = kind(ps), getattr(torch.optim, theirs)(ps, **option)
            message = f"{[*option][-1]} must be "
            refuses(ours.load_state_dict, other.state_dict(), message)
            refuses(ours.add_param_group, {"params": parameters([(2, 2)]), **option}, message)


TORCHS = [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adam, torch.optim.AdamW,
          torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adagrad,
          torch.optim.Adadelta, torch.optim.ASGD, torch.optim.Rprop,
          *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else [])]


@pytest.mark.parametrize("ours", [SGD, RMSProp, Adam, AdamW, Muon])
@pytest.mark.parametrize("trained", [True, False])
def test_state_of_another_optimizer_is_refused(ours, trained):
    for theirs in [*TORCHS, SGD, RMSProp, Adam, AdamW, Muon]:
        if theirs.__name__.lower() == ours.__name__.lower():
            continue
        ps = parameters([(3, 2)])
        other = theirs(ps)
        if {ours, theirs} in ({Adam, torch.optim.AdamW}, {AdamW, torch.optim.Adam}) and \
                "decoupled_weight_decay" not in other.defaults:
            continue  # before torch 2.7 the two cannot be told apart
        if trained:
            train(other, ps, 2)
        refuses(ours(ps).load_state_dict, other.state_dict(), "must be")


def test_arrays_that_do_not_belong_are_refused():
    ps = parameters([(3, 2)])
    before = Adam(ps)
    train(before, ps, 2)
    state = before.state_dict()
    for wrong in ({"exp_avg": torch.zeros(3, 2)}, {"exp_avg": torch.zeros(3, 2), "exp_inf": torch.zeros(3, 2)},
                  {"exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.zeros(2, 3)}):
        bad = {**state, "state": {0: {"step": torch.tensor(2.0), **wrong}}}
        refuses(Adam(ps).load_state_dict, bad, "arrays in the state must be")
    other = Adam(parameters([(2, 3)]))  # of another parameter
    refuses(other.load_state_dict, state, "arrays in the state must be")
    state["param_groups"][0]["lr"] = -1.0
    refuses(before.load_state_dict, state, "lr must be")


def test_momentum_may_be_switched_on_and_off():
    ps = parameters([(3, 2)])
    optimizer = SGD(ps, momentum=0.0)
    for momentum in (0.0, 0.9, 0.0):
        optimizer.param_groups[0]["momentum"] = momentum
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, ps, 2)
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_as_torch(dtype):
    for ours, theirs in ((SGD, "SGD"), (RMSProp, "RMSprop"), (Adam, "Adam"), (AdamW, "AdamW")):
        a, b = (parameters([(4, 3), (), (600, 500)], dtype) for _ in range(2))
        mine, other = ours(a, lr=0.1), getattr(torch.optim, theirs)(b, lr=0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            for p, q in zip(a, b):
                p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
                q.grad = p.grad.clone()
            mine.step()
            other.step()
        same(a, b, atol=2e-6)
    with pytest.raises(ValueError, match="params of Muon must be real matrices"):
        Muon(a[:1])


def test_closure_computes_gradients_and_its_loss_comes_back():
    w = torch.tensor([3.0], requires_grad=True)
    optimizer = SGD([w], lr=0.25)

    def closure():
        optimizer.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9
    assert w.item() == 1.5 and optimizer.step(closure).item() == 2.25
    assert optimizer.step() is None


def test_a_torch_scheduler_drives_it():
    ps = parameters()
    optimizer = AdamW(ps, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(optimizer, ps, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("kind", [SGD, RMSProp, Adam, AdamW, Muon])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_gradients_change_nothing(kind, bad):
    ps = parameters([(3, 3), (2, 2), (4, 2)])
    optimizer = kind([{"params": ps[:1]}, {"params": ps[1:]}])
    train(optimizer, ps, 2)
    before, state = copy.deepcopy([p.detach() for p in ps]), copy.deepcopy(optimizer.state_dict())
    give_gradients(ps, 2)
    ps[2].grad[1, 0] = bad
    with pytest.raises(ValueError, match=r"parameter 1 in group 1, of shape \(4, 2\), must be finite"):
        optimizer.step()
    same([p.detach() for p in ps], before, atol=0)
    same(optimizer.state_dict()["state"], state["state"], atol=0)


def steps_with_a_bad_part(rank, folder):
    """One of two processes that share a matrix; the nan is in the part of the second."""
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
    weight, other = (distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]).requires_grad_()
                     for _ in range(2))
    optimizer = AdamW([other, weight])
    for p in (other, weight):
        p.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    optimizer.step()
    if rank == 1:
        weight.grad.to_local()[0, 0] = math.nan
    try:
        optimizer.step()
    except ValueError as error:
        (folder / str(rank)).write_text(f"{error} {(weight == other).to_local().all()}")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_all_processes_that_share_a_bad_gradient_refuse_it(tmp_path):
    torch.multiprocessing.spawn(steps_with_a_bad_part, (tmp_path,), nprocs=2)
    for rank in "01":
        assert (tmp_path / rank).read_text() == ("gradient of parameter 1 in group 0, of shape (4, 3), "
                                                 "must be finite, not 'inf or nan' True")


def test_sparse_gradients_are_refused_by_torch():
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    optimizer = Adam(table.parameters())
    for act in (optimizer.step, lambda: clip_grad_norm(table.parameters(), 1.0)):
        with pytest.raises(RuntimeError, match="Sparse"):
            act()
    assert not optimizer.state


def test_large_but_finite_gradients_pass():
    w = torch.ones(3, requires_grad=True)
    w.grad = torch.full((3,), 1e30)
    Muon([m := torch.ones(2, 2, requires_grad=True)])  # nothing to do without a gradient
    SGD([w, m], lr=1e-30).step()
    same(w.detach(), torch.zeros(3))


def test_mixed_dtypes():
    a, b = ([p.detach().to(dtype).requires_grad_() for p, dtype in
             zip(parameters([(4, 3)] * 3), (torch.float32, torch.float64, torch.bfloat16))]
            for _ in range(2))
    train(AdamW(a), a, 10)
    train(torch.optim.AdamW(b), b, 10)
    same(a[:2], b[:2])
    torch.testing.assert_close(a[2], b[2])


@pytest.mark.parametrize("wrong, message", [
    (lambda ps: SGD(ps, lr=-1.0), "lr must be at least 0 and below inf, not -1"),
    (lambda ps: SGD(ps, lr=math.nan), "lr must be"),
    (lambda ps: SGD(ps, lr=math.inf), "lr must be"),
    (lambda ps: SGD(ps, momentum=1.0), "momentum must be at least 0 and below 1, not 1"),
    (lambda ps: RMSProp(ps, alpha=1.5), "alpha must be"),
    (lambda ps: Adam(ps, betas=(0.9, 1.0)), r"betas must be at least 0 and below 1, not \(0.9, 1.0\)"),
    (lambda ps: Adam(ps, eps=-1e-8), "eps must be"),
    (lambda ps: AdamW(ps, weight_decay=-0.1), "weight_decay must be"),
    (lambda ps: AdamW([{"params": ps, "lr": -2.0}]), "lr must be"),
    (lambda ps: Muon(ps), r"params of Muon must be real matrices .*, not \(5,\)"),
    (lambda ps: AdamW([]), "empty"),
])
def test_refuses_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(parameters())


def test_a_refused_group_is_not_kept():
    ps = parameters()
    refuses(Muon(ps[:1]).add_param_group, {"params": ps[1:2]}, "matrices")


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_orthogonalise_against_svd(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    sigma = S / S.norm()
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    torch.testing.assert_close(orthogonalise(G), U @ sigma.diag() @ Vh)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (5, 6, 4), (0, 4, 6)])
def test_orthogonalise_takes_each_matrix_of_a_stack_by_itself(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonalise(stack)
    assert found.shape == shape
    for one, matrix in zip(found.flatten(0, -3), stack.flatten(0, -3)):
        torch.testing.assert_close(one, orthogonalise(matrix))


def test_orthogonalise_of_zeros_is_zeros():
    assert (orthogonalise(torch.zeros(3, 2)) == 0).all()


steps = st.integers(1, 300)


@given(steps, st.floats(0, 1), st.floats(1e-6, 10), st.floats(0, 1), st.floats(0, 1), st.data())
def test_schedules(total, warm_share, max_lr, min_share, decay_share, data):
    warmup, min_lr = int(warm_share * (total - 1)), min_share * max_lr
    decay = max(1, int(decay_share * (total - warmup)))
    curves = {"cosine": lambda s: optim.cosine_schedule(s, max_lr, min_lr, warmup, total),
              "linear": lambda s: optim.linear_schedule(s, max_lr, min_lr, warmup, total),
              "wsd": lambda s: optim.wsd_schedule(s, max_lr, min_lr, warmup, total, decay),
              "constant": lambda s: optim.constant_schedule(s, max_lr, warmup)}
    step = data.draw(st.integers(0, total + 10))
    for name, curve in curves.items():
        now, then = curve(step), curve(step + 1)
        assert math.isclose(curve(warmup), max_lr, rel_tol=1e-9)
        assert -1e-12 <= now <= max_lr * (1 + 1e-9)
        if step < warmup:
            assert math.isclose(now, max_lr * (step + 1) / (warmup + 1), rel_tol=1e-9)
        else:
            assert then <= now * (1 + 1e-9) + 1e-15
        end = max_lr if name == "constant" else min_lr
        assert math.isclose(curve(total), end, rel_tol=1e-9, abs_tol=1e-12 * max_lr)
        assert curve(total + 50) == curve(total)
    if step >= warmup:
        share = min(1, (step - warmup) / (total - warmup))
        cosine = min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * share)) / 2
        assert math.isclose(curves["cosine"](step), cosine, rel_tol=1e-7, abs_tol=1e-12)
        line = max_lr + (min_lr - max_lr) * share
        assert math.isclose(curves["linear"](step), line, rel_tol=1e-7, abs_tol=1e-12)
        if step <= total - decay:
            assert math.isclose(curves["wsd"](step), max_lr, rel_tol=1e-9)


def test_cosine_without_warm_up_equals_torch():
    w = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0.1)
    for step in range(21):
        assert math.isclose(optimizer.param_groups[0]["lr"],
                            optim.cosine_schedule(step, 0.5, 0.1, 0, 20))
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("wrong, message", [
    (lambda: optim.cosine_schedule(-1, 1.0, 0.0, 0, 10), "step must be at least 0, not -1"),
    (lambda: optim.cosine_schedule(0, 1.0, 0.0, 10, 10), "warmup_steps must be from 0 to total_steps"),
    (lambda: optim.linear_schedule(0, 1.0, 0.0, -1, 10), "warmup_steps must be"),
    (lambda: optim.wsd_schedule(0, 1.0, 0.0, 5, 10, 6), "decay_steps must be from 1 to .* 5, not 6"),
    (lambda: optim.wsd_schedule(0, 1.0, 0.0, 5, 10, 0), "decay_steps must be"),
    (lambda: optim.cosine_schedule(0, 0.1, 0.2, 0, 10), "min_lr must be from 0 to max_lr = 0.1, not 0.2"),
    (lambda: optim.constant_schedule(0, -1.0), "min_lr must be|max_lr must be"),
])
def test_schedules_refuse(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@given(st.integers(0, 99), st.floats(0, 20))
def test_clipping_as_torch(seed, max_norm):
    a, b = parameters(SHAPES[:4]), parameters(SHAPES[:4])
    for ps in (a, b):
        give_gradients(ps, seed, absent=(1,))
    before = [None if p.grad is None else p.grad.clone() for p in a]
    norm = clip_grad_norm(iter(a), max_norm)
    same(norm, torch.nn.utils.clip_grad_norm_(b, max_norm), atol=1e-5)
    assert a[1].grad is None
    for p, other, old in zip(a, b, before):
        if old is not None:
            same(p.grad, other.grad)
            assert norm > max_norm - 1e-5 or torch.equal(p.grad, old)


def test_clipping_edges():
    w = torch.zeros(2, requires_grad=True)
    assert clip_grad_norm([w], 1.0) == 0 == clip_grad_norm([], 1.0)
    w.grad = torch.tensor([3.0, 4.0])
    assert clip_grad_norm(w, math.inf) == 5 and w.grad.tolist() == [3, 4]  # one tensor will do
    for bad in (math.nan, math.inf):
        w.grad[0] = bad
        with pytest.raises(ValueError, match="norm of the gradients must be finite"):
            clip_grad_norm([w], 1.0)
        assert w.grad[1] == 4
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm must be at least 0"):
            clip_grad_norm([w], bad)


def test_a_small_network_learns_with_each():
    for kind, lr in ((SGD, 0.1), (RMSProp, 0.01), (Adam, 0.02), (AdamW, 0.02), (Muon, 0.05)):
        generator = torch.Generator().manual_seed(0)
        X, W = (torch.randn(shape, generator=generator) for shape in ((64, 5), (5, 3)))
        w = torch.zeros(5, 3, requires_grad=True)
        optimizer, losses = kind([w], lr=lr), []
        for _ in range(100):
            optimizer.zero_grad()
            loss = ((X @ w - X @ W) ** 2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.1 * losses[0], kind


def test_betas_must_be_two():
    for betas in ([0.9], 0.9, [0.9, 0.9, 0.9]):
        ps = parameters([(2, 2)])
        optimizer = AdamW([{"params": ps, "betas": betas}])
        with pytest.raises((ValueError, TypeError), match="unpack|values"):
            train(optimizer, ps, 1)


def test_nesterov_without_momentum_is_gradient_descent():
    a, b = parameters(), parameters()
    train(SGD(a, nesterov=True), a, 3)
    train(SGD(b), b, 3)
    same(a, b, atol=0)


def test_empty_matrices_are_left_alone():
    ps = parameters([(0, 3), (3, 0), (2, 2)])
    train(Muon(ps), ps, 2)


@pytest.mark.parametrize("kind", [SGD, RMSProp, Adam, AdamW, Muon])
def test_a_state_is_loaded_again_and_again(kind):
    ps = parameters([(2, 3)])
    ours, other = kind(ps), kind(parameters([(2, 3)]))
    for _ in range(2):
        ps[0].grad = torch.ones(2, 3)
        ours.step()
        other.load_state_dict(ours.state_dict())
        ours.load_state_dict(other.state_dict())


@pytest.mark.parametrize("layout", ["grad transposed", "grad repeated", "parameter transposed", "with gaps"])
def test_the_order_in_memory_does_not_matter(layout):
    """torch's fused kernels are silently wrong here."""
    def made():
        torch.manual_seed(0)
        w = torch.randn(6, 4)
        if layout == "parameter transposed":
            w = w.T
        elif layout == "with gaps":
            w = torch.randn(6, 8)[:, ::2]
        w = torch.nn.Parameter(w)
        w.grad = torch.randn(w.shape[1], w.shape[0]).T
        if layout == "grad repeated":
            w.grad = torch.randn(len(w), 1).expand(w.shape)
        return w

    for ours, theirs in ((Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)):
        a, b = made(), made()
        one, other = ours([a], lr=0.1, weight_decay=0.1), theirs([b], lr=0.1, weight_decay=0.1, foreach=False)
        for _ in range(3):
            one.step()
            other.step()
        same(a, b)
