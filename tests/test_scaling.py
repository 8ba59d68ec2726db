"""Chapter 18: counting, the law and its optimum, the fit, and runs that share a trunk."""
import math
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llm_book.gpt import GPT, GPTConfig
from llm_book.lab import recall
from llm_book.scaling import (
    BESIROGLU,
    H100_BF16,
    HOFFMANN,
    ScalingLaw,
    bootstrap_laws,
    compute_optimal,
    count_parameters,
    fit_power_law,
    gauss_newton,
    huber,
    loss_at,
    plan_training,
    rented_flops,
    residuals_and_slopes,
    steps_before_decay,
    train_branches,
    training_flops,
)
from llm_book.train import TrainConfig, evaluate, train

torch.set_num_threads(1)

TRUE = ScalingLaw(E=0.7, A=60, alpha=0.45, B=300, beta=0.35)
SIZES = np.repeat(np.geomspace(1e4, 1e6, 6), 5)
LENGTHS = np.tile(np.geomspace(8e4, 1.2e6, 5), 6)

laws = st.builds(ScalingLaw, E=st.floats(0, 3), A=st.floats(1, 1e3), alpha=st.floats(0.1, 1),
                 B=st.floats(1, 1e3), beta=st.floats(0.1, 1))


def noisy(seed, law=TRUE, noise=0.005):
    return loss_at(law, SIZES, LENGTHS) * np.exp(noise * np.random.default_rng(seed).normal(size=30))


# ---- counting

@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"positions": "rotary", "norm": "rms", "bias": "none"},
                                     {"positions": "rotary", "feed_forward": "swiglu", "bias": "qkv", "n_kv_heads": 2}])
def test_parameters_are_those_of_the_model(changes):
    config = GPTConfig(**{**dict(vocab_size=50, max_len=16, n_layers=2, d_model=16, n_heads=4), **changes})
    model = GPT(config)
    blocks, tables = count_parameters(config)
    assert blocks + tables == sum(p.numel() for p in model.parameters())
    assert blocks == sum(p.numel() for part in (model.blocks, model.norm) for p in part.parameters())
    assert tables == 50 * 16 * (2 - config.tied) + 16 * 16 * (config.positions == "learned")


def test_parameters_of_a_large_model_take_no_memory():
    blocks, tables = count_parameters(GPTConfig.preset("gpt2-xl"))
    assert blocks + tables == 1_557_611_200


@pytest.mark.parametrize("width", [16, 64, 256])
def test_flops_are_those_that_torch_counts(width):
    config = GPTConfig(256, max_len=32, n_layers=2, d_model=width, n_heads=2, positions="rotary", bias="none",
                       norm="rms", feed_forward="swiglu")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        ids = torch.zeros(3, 32, dtype=torch.long)
        GPT(config)(ids, ids)[1].backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    norms = 5 * width  # they have weights and no matrix products
    assert products == training_flops(sum(count_parameters(config)) - norms, 3 * 32)


# ---- the law

@given(laws, st.floats(1e3, 1e12), st.floats(1e3, 1e13))
def test_loss_falls_with_both_and_stays_above_e(law, n_params, n_tokens):
    here = loss_at(law, n_params, n_tokens)
    assert here >= law.E
    assert loss_at(law, 2 * n_params, n_tokens) <= here and loss_at(law, n_params, 2 * n_tokens) <= here


@given(laws, st.floats(9, 26))
@hypothesis_settings(max_examples=60)
def test_the_best_size_is_the_one_that_a_search_finds(law, exponent):
    flops = 10**exponent
    N, D = compute_optimal(law, flops)
    assert math.isclose(6 * N * D, flops, rel_tol=1e-9)
    candidates = N * np.geomspace(1e-2, 1e2, 801)
    losses = loss_at(law, candidates, flops / 6 / candidates)
    assert loss_at(law, N, D) <= losses.min() * (1 + 1e-12)
    slopes = law.alpha * law.A / N**law.alpha, law.beta * law.B / D**law.beta
    assert math.isclose(*slopes, rel_tol=1e-6)


@pytest.mark.parametrize("law, exponent, tolerance", [(HOFFMANN, 0.46, 0.01), (BESIROGLU, 0.513, 0.001)])
def test_frontiers_of_the_literature(law, exponent, tolerance):
    """Hoffmann et al. 2022, table 2, approach 3; Besiroglu et al. 2024, section 3."""
    N, D = compute_optimal(law, np.array([1e20, 1e22]))
    slope = np.log(N[1] / N[0]) / np.log(100)
    assert math.isclose(slope, law.beta / (law.alpha + law.beta), rel_tol=1e-9)
    assert abs(slope - exponent) <= tolerance
    assert np.allclose(N * D * 6, [1e20, 1e22])


def test_twenty_tokens_for_each_parameter_of_chinchilla():
    N, D = compute_optimal(BESIROGLU, 5.76e23)
    assert 15 < D / N < 25 and 5e10 < N < 9e10  # the model has 70 billion
    N, D = compute_optimal(HOFFMANN, 5.76e23)
    assert D / N > 40  # the published numbers contradict the model that was trained


@pytest.mark.parametrize("change, message", [
    ({"E": -0.1}, "E must be at least 0 and finite, not -0.1"), ({"E": math.nan}, "E must be"),
    ({"A": 0.0}, "A must be above 0 and finite, not 0.0"), ({"alpha": -1.0}, "alpha must be"),
    ({"B": math.inf}, "B must be"), ({"beta": math.nan}, "beta must be")])
def test_a_law_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TRUE, **change)


@pytest.mark.parametrize("call, name", [
    (lambda: loss_at(TRUE, 0, 10), "n_params"), (lambda: loss_at(TRUE, [1, 2], [3, -1]), "n_tokens"),
    (lambda: training_flops(-1, 2), "n_params"), (lambda: training_flops(1, math.nan), "n_tokens"),
    (lambda: compute_optimal(TRUE, 0), "flops"), (lambda: rented_flops(-1), "gpu_hours"),
    (lambda: rented_flops(1, peak_flops=0), "peak_flops"), (lambda: rented_flops(1, mfu=1.5), "mfu"),
    (lambda: plan_training(TRUE, math.inf), "flops"), (lambda: plan_training(TRUE, 1e9, n_params=-3), "n_params"),
    (lambda: plan_training(TRUE, 1e9, n_gpus=0), "n_gpus"), (lambda: plan_training(TRUE, 1e9, mfu=0), "mfu"),
    (lambda: plan_training(TRUE, 1e9, price=-1), "price")])
def test_what_is_not_positive_is_refused_by_name(call, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        call()


# ---- the fit

def lbfgs(losses, delta):
    """The peer: torch's L-BFGS on the raw five numbers, as in the paper, from a few starts."""
    log_n, log_d, target = (torch.log(torch.tensor(x)) for x in (SIZES, LENGTHS, losses))

    def misfit(theta):
        e, a, alpha, b, beta = theta
        predicted = torch.stack([e.expand(30), a - alpha * log_n, b - beta * log_d]).logsumexp(0)
        return nn.functional.huber_loss(predicted, target, delta=delta, reduction="sum") / delta**2

    def minimised(alpha, beta):
        rest = math.log(losses.mean() / 4)
        theta = torch.tensor([math.log(losses.mean() / 2), rest + alpha * log_n.mean(), alpha,
                              rest + beta * log_d.mean(), beta], dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([theta], max_iter=500, line_search_fn="strong_wolfe",
                                   tolerance_grad=1e-12, tolerance_change=1e-14)

        def closure():
            solver.zero_grad()
            value = misfit(theta)
            value.backward()
            return value

        solver.step(closure)
        return theta.detach()

    e, a, alpha, b, beta = best = min((minimised(0.3, 0.3), minimised(0.6, 0.6)), key=misfit)
    return misfit(best).item(), ScalingLaw(*map(float, (e.exp(), a.exp(), alpha, b.exp(), beta)))


@pytest.mark.parametrize("delta", [0.003, 0.01, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_the_fit_is_at_least_as_good_as_lbfgs(seed, delta):
    losses = noisy(seed)
    theirs, law = lbfgs(losses, delta)
    ours = fit_power_law(SIZES, LENGTHS, losses, delta=delta)
    residuals = np.log(loss_at(ours, SIZES, LENGTHS) / losses)
    assert huber(residuals, delta).sum() / delta**2 <= theirs * (1 + 1e-4)
    np.testing.assert_allclose(astuple(ours), astuple(law), rtol=0.02)


@given(st.floats(0.2, 2), st.floats(0.25, 0.7), st.floats(0.25, 0.7), st.floats(0.1, 0.6), st.floats(0.1, 0.6))
@hypothesis_settings(max_examples=25)
def test_without_noise_the_law_comes_back(E, alpha, beta, small, little):
    """`small` and `little` are the two terms in the middle of the grid."""
    law = ScalingLaw(E, small * 1e5**alpha, alpha, little * 3e5**beta, beta)
    found = fit_power_law(SIZES, LENGTHS, loss_at(law, SIZES, LENGTHS))
    np.testing.assert_allclose(astuple(found), astuple(law), rtol=0.05)
    np.testing.assert_allclose(loss_at(found, SIZES, LENGTHS), loss_at(law, SIZES, LENGTHS), rtol=1e-4)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    hits = np.zeros(5)
    for seed in range(20):
        found = bootstrap_laws(SIZES, LENGTHS, noisy(seed), np.random.default_rng(seed), n_resamples=40)
        low, high = np.quantile([astuple(law) for law in found], [0.05, 0.95], axis=0)
        hits += (low <= astuple(TRUE)) & (astuple(TRUE) <= high)
    assert (hits / 20 >= 0.7).all()


def test_wider_noise_gives_wider_intervals():
    width = []
    for noise in (0.002, 0.02):
        found = bootstrap_laws(SIZES, LENGTHS, noisy(0, noise=noise), np.random.default_rng(0), n_resamples=50)
        width.append(np.std([law.alpha for law in found]))
    assert width[1] > 3 * width[0]


def test_one_bad_run_hardly_moves_the_law():
    losses = noisy(1)
    losses[7] *= 1.3
    bad = fit_power_law(SIZES, LENGTHS, losses)
    squares = fit_power_law(SIZES, LENGTHS, losses, delta=10.0)
    truth = loss_at(TRUE, SIZES, LENGTHS)
    errors = [np.abs(loss_at(law, SIZES, LENGTHS) / truth - 1).max() for law in (bad, squares)]
    assert errors[0] < 0.02 < errors[1]


def test_order_and_units_do_not_matter():
    losses, shuffled = noisy(2), np.random.default_rng(0).permutation(30)
    one = fit_power_law(SIZES, LENGTHS, losses)
    other = fit_power_law(SIZES[shuffled], LENGTHS[shuffled], losses[shuffled])
    np.testing.assert_allclose(astuple(one), astuple(other), rtol=1e-3)
    scaled = fit_power_law(SIZES, LENGTHS / 4, losses)  # tokens of four bytes
    np.testing.assert_allclose((scaled.E, scaled.alpha, scaled.beta), (one.E, one.alpha, one.beta), rtol=1e-3)
    assert math.isclose(scaled.B, one.B / 4**one.beta, rel_tol=1e-2)


def test_slopes_are_those_of_finite_differences():
    rng = np.random.default_rng(0)
    theta, data = rng.normal(size=(3, 5)) / 2, rng.normal(size=(3, 7))
    _, slopes = residuals_and_slopes(theta, *data)
    for i in range(5):
        nudge = 1e-6 * np.eye(5)[i]
        above, below = (residuals_and_slopes(theta + sign * nudge, *data)[0] for sign in (1, -1))
        np.testing.assert_allclose(slopes[..., i], (above - below) / 2e-6, atol=1e-8)


def test_huber_is_torchs():
    r = np.linspace(-0.1, 0.1, 41)
    theirs = nn.functional.huber_loss(torch.tensor(r), torch.zeros(41), reduction="none", delta=0.03)
    np.testing.assert_allclose(huber(r, 0.03), theirs.numpy(), atol=1e-12)


def test_descent_never_climbs():
    rng = np.random.default_rng(3)
    theta, data, counts = rng.normal(size=(20, 5)), rng.normal(size=(3, 9)), np.ones((20, 9))
    before = huber(residuals_and_slopes(theta, *data)[0], 0.01).sum(-1)
    after, losses = gauss_newton(theta, tuple(data), counts, 0.01)
    assert (losses <= before).all() and np.isfinite(after).all()


@pytest.mark.parametrize("runs, message", [
    (([1e4] * 6, range(1, 7), [2.0] * 6), r"at least 6, of at least 3 sizes and 3 lengths, not \(6, 1, 6\)"),
    (([1, 2, 3], [1, 2, 3], [2, 2, 2]), r"not \(3, 3, 3\)"), (([1] * 6, [0] * 6, [2] * 6), "n_tokens"),
    (([1] * 6, [1] * 6, [math.nan] * 6), "losses")])
def test_a_fit_refuses(runs, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(*map(list, runs))
    with pytest.raises(ValueError, match=message):
        bootstrap_laws(*map(list, runs), np.random.default_rng(0))


def test_a_fit_refuses_delta():
    with pytest.raises(ValueError, match="delta must be above 0"):
        fit_power_law(SIZES, LENGTHS, noisy(0), delta=0)


# ---- runs that share a trunk

TOKENS = np.random.default_rng(0).integers(0, 11, 600)


def gpt(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=11, max_len=8, n_layers=1, d_model=8, n_heads=2, positions="rotary"))


def configs(*steps, **changes):
    small = dict(batch_size=2, seq_len=8, warmup_steps=2, eval_windows=4, schedule="wsd", max_lr=1e-2, min_lr=1e-4)
    return [TrainConfig(n, **{**small, **changes}) for n in steps]


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "accumulation_steps": 2}, {"schedule": "cosine"},
                                     {"schedule": "constant", "seed": 3}])
def test_branches_are_separate_runs_in_every_bit(changes):
    lengths = configs(4, 6, 12, **changes)
    model = gpt()
    before = [p.clone() for p in model.parameters()]
    results = train_branches(model, TOKENS, TOKENS, lengths)
    assert all(map(torch.equal, before, model.parameters()))
    for config, result in zip(lengths, results):
        assert train(gpt(), TOKENS, TOKENS, config, progress=False)[-1]["val_loss"] == result["loss"]
        trunk = config.max_steps - max(1, config.max_steps // 5) + 1
        expected = {"constant": config.max_steps, "cosine": 3}.get(config.schedule, trunk)
        assert (result["steps"], result["trunk_steps"]) == (config.max_steps, expected)


def test_the_trunk_is_a_run_without_decay():
    results = train_branches(gpt(), TOKENS, TOKENS, configs(5, 10))
    for result in results:
        (config,) = configs(result["trunk_steps"], schedule="constant")
        alone = train(gpt(), TOKENS, TOKENS, config, progress=False)
        assert alone[-1]["val_loss"] == result["trunk_loss"]


def test_both_texts_are_asked():
    results = train_branches(gpt(), TOKENS[:100], TOKENS[100:], configs(3, 6, eval_windows=0))
    for config, result in zip(configs(3, 6, eval_windows=0), results):
        model = gpt()
        train(model, TOKENS[:100], TOKENS[100:], config, progress=False)
        assert result["train_loss"] == evaluate(model, TOKENS[:100], 8, batch_size=config.batch_size)
        assert result["loss"] == evaluate(model, TOKENS[100:], 8, batch_size=config.batch_size)


def test_without_decay_all_steps_come_before_it():
    assert steps_before_decay(configs(7, min_lr=1e-2)[0]) == 7


def test_a_branch_that_shares_all_its_steps_has_the_trunk_s_loss():
    for result in train_branches(gpt(), TOKENS, TOKENS, configs(3, 7, schedule="constant", eval_every=2)):
        assert result["loss"] == result["trunk_loss"] and result["steps"] == result["trunk_steps"]


def test_branches_refuse():
    with pytest.raises(ValueError, match=r"configs must be at least one, in order of max_steps, not \[9, 4\]"):
        train_branches(gpt(), TOKENS, TOKENS, configs(9, 4))
    for none in ([], configs(4, 4)):
        with pytest.raises(ValueError, match="in order of max_steps"):
            train_branches(gpt(), TOKENS, TOKENS, none)
    with pytest.raises(ValueError, match="the same but for max_steps"):
        train_branches(gpt(), TOKENS, TOKENS, configs(4) + configs(9, seed=1))


# ---- the calculator

@given(laws, st.floats(15, 25), st.floats(0.05, 1), st.integers(1, 10_000))
@hypothesis_settings(max_examples=40)
def test_a_plan_spends_exactly_what_was_rented(law, exponent, mfu, n_gpus):
    plan = plan_training(law, 10**exponent, mfu=mfu, n_gpus=n_gpus, price=3.0)
    assert math.isclose(rented_flops(plan.gpu_hours, mfu=mfu), 10**exponent, rel_tol=1e-9)
    assert math.isclose(training_flops(plan.n_params, plan.n_tokens), plan.flops, rel_tol=1e-9)
    assert math.isclose(plan.days * 24 * n_gpus, plan.gpu_hours, rel_tol=1e-9)
    assert math.isclose(plan.cost, 3 * plan.gpu_hours, rel_tol=1e-9)
    assert plan.loss == loss_at(law, plan.n_params, plan.n_tokens)


def test_a_plan_with_a_size_of_your_own():
    best, small = plan_training(BESIROGLU, 1e21), plan_training(BESIROGLU, 1e21, n_params=5e8)
    assert small.n_params == 5e8 and math.isclose(small.n_tokens, 1e21 / 6 / 5e8)
    assert small.loss > best.loss and small.cost == best.cost


def test_numbers_on_paper():
    assert H100_BF16 == 989e12
    assert rented_flops(10, peak_flops=1e15, mfu=0.5) == 10 * 3600 * 0.5e15
    plan = plan_training(BESIROGLU, 3.6e18, peak_flops=1e15, mfu=0.5, n_gpus=2, price=2.0)
    assert math.isclose(plan.gpu_hours, 2) and math.isclose(plan.cost, 4) and math.isclose(plan.days, 1 / 24)


# ---- the ledger

def test_recorded_runs_are_what_the_page_says():
    runs = {name: entry for name, entry in recall("scaling").items() if name.startswith("w")}
    assert len(runs) >= 5
    for entry in runs.values():
        facts = entry["context"]
        assert max(facts["tokens"]) <= facts["train_bytes"]
        assert len(facts["tokens"]) == len(facts["losses"]) == len(facts["trunk_losses"])
        assert entry["value"] == facts["losses"][-1]
