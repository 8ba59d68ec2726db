"""Chapter 15: accumulation, settings, evaluation, the loop."""
import copy
import math

import numpy as np
import pytest
import torch
from gpts import without_type_checker
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from small import TOKENS, config, gpt, mlp, same, without_speed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llm_book.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from llm_book.lab import plot_history
from llm_book.optim import AdamW, Muon, cosine_schedule
from llm_book.train import (
    Run,
    TrainingDiverged,
    accumulate,
    compiled,
    draw_batches,
    evaluate,
    make_optimizers,
    steps,
    train,
    update,
)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@given(st.lists(st.integers(0, 7), min_size=4, max_size=4).filter(any), st.integers(0, 99),
       st.sampled_from([gpt, mlp]), st.sampled_from([1, 2]))
@hypothesis_settings(max_examples=25)
def test_accumulated_equals_the_large_batch(lengths, seed, make, rows):
    x = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(seed))
    y = x.roll(-1, 1).where(torch.arange(7) < torch.tensor(lengths)[:, None], -100)
    small, large = make(), make()
    found = accumulate(small, list(zip(x.split(rows), y.split(rows))))
    loss = large(x, y)[1]
    loss.backward()
    assert math.isclose(found, loss.item(), rel_tol=1e-6)
    a, b = gradient(small), gradient(large)
    assert (a - b).norm() <= 1e-6 * b.norm()


def test_accumulation_adds_and_refuses_nothing_to_learn():
    x = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))
    model = gpt()
    accumulate(model, [(x, x)])
    once = gradient(model)
    accumulate(model, [(x, x)])
    torch.testing.assert_close(gradient(model), 2 * once)
    accumulate(model, iter([(x, x)]))
    torch.testing.assert_close(gradient(model), 3 * once)
    with pytest.raises(ValueError, match="batches must be at least one target that counts"):
        accumulate(model, [(x, torch.full_like(x, -100))])


def test_bfloat16_is_used_and_close():
    x = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))
    full, half = gpt(d_model=32), gpt(d_model=32)
    a, b = accumulate(full, [(x, x)]), accumulate(half, [(x, x)], "bfloat16")
    assert a != b and abs(a - b) < 0.01
    assert {p.grad.dtype for p in half.parameters()} == {torch.float32}
    torch.testing.assert_close(gradient(full), gradient(half), atol=0.02, rtol=0.1)


@pytest.mark.parametrize("changes, message", [
    (dict(max_steps=0), "max_steps must be a whole number of at least 1, not 0"),
    (dict(batch_size=-1), "batch_size must"), (dict(seq_len=0), "seq_len must"),
    (dict(accumulation_steps=0), "^accumulation_steps must"), (dict(eval_every=0), "^eval_every must"),
    (dict(checkpoint_every=0), "^checkpoint_every must"), (dict(keep_last=0), "^keep_last must"),
    (dict(keep_last=True), "keep_last must be a whole number"),
    (dict(eval_windows=-1), "eval_windows must be a whole number of at least 0"),
    (dict(seed=2**32), "seed must be below 2..32, not 4294967296"), (dict(seed=-1), "^seed must"), (dict(max_lr=0.0), "max_lr must be above 0 and finite, not 0.0"),
    (dict(max_lr=math.inf), "^max_lr must"), (dict(max_lr=math.nan), "^max_lr must"),
    (dict(muon_lr=-1.0), "^muon_lr must"), (dict(max_norm=0.0), "max_norm must be above 0, not"),
    (dict(weight_decay=-0.1), "^weight_decay must"), (dict(weight_decay=math.inf), "^weight_decay must"),
    (dict(min_lr=0.1), "min_lr must be from 0 to max_lr = 0.01, not 0.1"),
    (dict(min_lr=-0.1), "^min_lr must"), (dict(warmup_steps=6), "warmup_steps must be below max_steps, not 6"),
    (dict(betas=(0.9, 1.0)), "^betas must"), (dict(schedule="cosinus"), "schedule must be one of"),
    (dict(optimizer="sgd"), "optimizer must be one of"), (dict(precision="half"), "^precision must"),
])
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@given(st.integers(1, 40), st.data(), st.sampled_from(["cosine", "linear", "constant", "wsd"]))
def test_schedules_are_shares(max_steps, data, schedule):
    warmup = data.draw(st.integers(0, max_steps - 1))
    c = config(max_steps=max_steps, warmup_steps=warmup, schedule=schedule)
    shares = [c.lr_share(step) for step in range(max_steps)]
    assert all(0 < share <= 1 for share in shares) and shares[:warmup] == sorted(shares[:warmup])
    if schedule == "cosine":
        for step, share in enumerate(shares):
            peer = cosine_schedule(step, c.max_lr, c.min_lr, warmup, max_steps)
            assert math.isclose(share * c.max_lr, peer, rel_tol=1e-9)


def test_each_parameter_has_one_optimizer():
    model = gpt()
    both = make_optimizers(model, config(optimizer="muon", muon_lr=0.05))
    assert [type(one) for one in both] == [AdamW, Muon]
    owned = [p for one in both for group in one.param_groups for p in group["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))
    for one in both:
        for group in one.param_groups:
            assert (group["weight_decay"] > 0) == all(p.ndim > 1 for p in group["params"])
            assert group["max_lr"] == (0.05 if one is both[1] else 0.01)
    assert not any(p is model.embedding.weight for p in both[1].param_groups[0]["params"])
    model.embedding.weight.requires_grad_(False)
    (one,) = make_optimizers(model, config())
    assert sum(len(group["params"]) for group in one.param_groups) == len(owned) - 1
    with pytest.raises(ValueError, match="optimizer must be 'adamw' for a model without `blocks`"):
        make_optimizers(mlp(), config(optimizer="muon"))


@given(st.integers(2, 40), st.integers(1, 9), st.integers(1, 4))
def test_evaluate_asks_each_token_once(n, seq_len, batch_size):
    model, ids = mlp(context=1), torch.from_numpy(TOKENS[:n])  # looks back one token: cuts cost nothing
    expected = model(ids[None, :-1], ids[None, 1:])[1].item()
    assert math.isclose(evaluate(model, ids, seq_len, batch_size=batch_size), expected, rel_tol=1e-5)


def test_evaluate_is_fixed_and_restores_the_mode():
    model = gpt(dropout=0.5)
    before = torch.get_rng_state()
    found = {evaluate(model, TOKENS, 8, n_windows=5) for _ in range(3)}
    assert len(found) == 1 and model.training and torch.equal(before, torch.get_rng_state())
    starts = np.linspace(0, len(TOKENS) - 9, 5).astype(int)
    rows = torch.tensor(np.stack([TOKENS[s:s + 9] for s in starts]))
    assert math.isclose(*found, model.eval()(rows[:, :-1], rows[:, 1:])[1].item(), rel_tol=1e-6)
    evaluate(model, TOKENS, 8, n_windows=5)
    assert not model.training
    assert evaluate(model, TOKENS, 8, n_windows=10_000) == evaluate(model, TOKENS, 8)
    model.train()
    with pytest.raises(ValueError, match="n_windows must be at least 0"):
        evaluate(model, TOKENS, 8, n_windows=-1)
    with pytest.raises(ValueError, match="max_len|place 16"):
        evaluate(model, TOKENS, 40)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        evaluate(model, TOKENS, 8, batch_size=0, n_windows=3)
    assert model.training


@pytest.mark.parametrize("make, optimizer, steps", [(gpt, "muon", 1), (gpt, "adamw", 3), (mlp, "adamw", 2)])
def test_the_loop_equals_five_lines(make, optimizer, steps):
    c = config(optimizer=optimizer, accumulation_steps=steps, max_norm=0.5)
    model, by_hand = make(), make()
    history = train(model, TOKENS, TOKENS, c, progress=False)
    generator, losses = torch.Generator().manual_seed(c.seed), []
    optimizers = make_optimizers(by_hand, c)
    for step in range(c.max_steps):
        for one in optimizers:
            for group in one.param_groups:
                group["lr"] = group["max_lr"] * c.lr_share(step)
            one.zero_grad()
        starts = torch.cat([torch.randint(len(TOKENS) - 8, (2,), generator=generator)
                            for _ in range(steps)])
        rows = torch.tensor(np.stack([TOKENS[s:s + 9] for s in starts]))
        loss = by_hand(rows[:, :-1], rows[:, 1:])[1]
        loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        for one in optimizers:
            one.step()
        losses.append(loss.item())
    np.testing.assert_allclose([entry["loss"] for entry in history], losses, rtol=1e-4)
    assert [entry["step"] for entry in history if "val_loss" in entry] == [3, 6]
    assert history[-1]["val_loss"] == evaluate(model, TOKENS, 8, n_windows=4, batch_size=2)
    assert all(entry["tokens_per_second"] > 0 for entry in history)


def test_it_learns_and_the_global_dice_do_not_matter():
    cycle = np.arange(600) % 11
    c = config(max_steps=60, max_lr=3e-2)
    found = []
    for seed in (1, 2):
        model = gpt(dropout=0.1)
        torch.manual_seed(seed)
        found.append(train(model, cycle, cycle, c, progress=False))
    assert without_speed(found[0]) == without_speed(found[1])
    assert found[0][-1]["val_loss"] < 1 < found[0][0]["loss"]


class Explodes(nn.Module):
    """A loss that is `value` from a certain pass on; its slope is `slope`."""

    def __init__(self, passes, value, slope=0.0):
        super().__init__()
        self.weight, self.left = nn.Parameter(torch.zeros(2)), passes
        self.value, self.slope = value, slope

    def forward(self, ids, targets):
        self.left -= 1
        if self.left >= 0:
            return None, 1 + self.weight.sum() * 0
        return None, self.value + (self.weight * self.slope).sum()


@pytest.mark.parametrize("value, slope, message", [
    (math.nan, 0.0, "the loss must be finite, not nan, at step 5"),
    (math.inf, 0.0, "the loss must be finite, not inf, at step 5"),
    (1.0, 3e38, "the gradients must be finite, not inf, at step 5"),
])
def test_nan_stops_with_an_address(tmp_path, value, slope, message):
    c = config(schedule="linear", eval_every=100, checkpoint_every=2)
    model = Explodes(4, value, slope)
    with pytest.raises(TrainingDiverged, match=f"{message}; last good checkpoint: .*step_00000004"):
        train(model, TOKENS, TOKENS, c, out_dir=tmp_path, progress=False)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    assert model.weight.isfinite().all()
    with pytest.raises(TrainingDiverged, match=f"{message}$"):
        train(Explodes(4, value, slope), TOKENS, TOKENS, c, progress=False)


def test_a_validation_loss_that_is_no_number_stops():
    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, ids, targets):
            return None, self.weight.sum() + (1.0 if self.training else math.nan)

    with pytest.raises(TrainingDiverged, match="the validation loss is nan, at step 3"):
        train(Sees(), TOKENS, TOKENS, config(), progress=False)


def test_a_loss_that_runs_away_stops():
    c = config(max_steps=60, eval_every=100)
    with pytest.raises(TrainingDiverged, match=r"the mean of the last 20 losses is 3.\d+, and was 1 at best, at step 42"):
        train(Explodes(25, 3.5), TOKENS, TOKENS, c, progress=False)  # from step 26 on
    assert len(train(Explodes(25, 2.9), TOKENS, TOKENS, c, progress=False)) == 60


def test_an_easy_validation_text_or_an_easy_first_batch_is_no_divergence():
    """Training losses are compared with training losses, and never one by one."""
    rng = np.random.default_rng(0)
    half_random = np.concatenate([np.arange(3_000) % 2, rng.integers(0, 11, 3_000)])
    easy = np.arange(600) % 2
    c = config(max_steps=60, max_lr=3e-2, eval_every=5)
    assert len(train(gpt(), half_random, easy, c, progress=False)) == 60
    first = np.r_[np.zeros(9, int), rng.integers(0, 11, 600)]

    def easy_first(run, tokens):
        batch = torch.from_numpy(first[None, :9])
        return [(batch[:, :-1], batch[:, 1:])] if run.step == 0 else draw_batches(run, tokens)

    run = Run(gpt(), c, draw=easy_first)
    run.model.head.weight.data[0] += 3  # so that the first batch is cheap
    assert len(list(steps(run, first, first))) == 60


# ---- the loop as a generator

def test_a_run_can_be_watched_interrupted_and_continued():
    c = config(optimizer="muon", accumulation_steps=2)
    whole, parted = gpt(), gpt()
    history = train(whole, TOKENS, TOKENS, c, progress=False)
    run = Run(parted, c)
    for entry in steps(run, TOKENS, TOKENS):
        if entry["step"] == 4:
            break
    assert run.step == 4 and len(run.history) == 4 and run.due(2) and not run.due(3)
    assert [entry["step"] for entry in steps(run, TOKENS, TOKENS)] == [5, 6]
    assert without_speed(run.history) == without_speed(history)
    assert same(whole.state_dict(), parted.state_dict()) and run.due(100)


def test_the_state_of_a_run_is_all_that_its_next_step_needs():
    c = config(optimizer="muon")
    one, other = Run(gpt(dropout=0.3), c), Run(gpt(dropout=0.3, seed=1), c)
    torch.manual_seed(5)
    for _ in range(3):
        update(one, one.draw(one, TOKENS))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    random = torch.get_rng_state()
    a = update(one, one.draw(one, TOKENS))
    torch.set_rng_state(random)
    b = update(other, other.draw(other, TOKENS))
    assert without_speed([a]) == without_speed([b]) and same(one.model.state_dict(), other.model.state_dict())
    with pytest.raises(ValueError, match="of another model"):
        Run(gpt(d_model=16), c).load_state_dict(one.state_dict())


def test_draw_and_accumulate_can_be_replaced():
    seen = []

    def spy(model, batches, precision):
        seen.append((len(batches), precision))
        return accumulate(model, batches, precision)

    run = Run(gpt(), config(), draw=lambda run, tokens: draw_batches(run, tokens)[:1] * 3, accumulate=spy)
    assert len(list(steps(run, TOKENS, TOKENS))) == 6 and seen == [(3, "float32")] * 6


def test_too_few_tokens_are_refused_at_once(tmp_path):
    for tokens_train, tokens_val, message in ((TOKENS[:8], TOKENS, "tokens_train must be at least 9"),
                                              (TOKENS, TOKENS[:1], "tokens_val must be at least 2")):
        with pytest.raises(ValueError, match=message):
            train(gpt(), tokens_train, tokens_val, config(), out_dir=tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()


def test_progress_and_picture(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    history = train(gpt(), TOKENS, TOKENS, config())
    shown = capsys.readouterr()
    assert "training" in shown.err and "tokens/s" in shown.err + shown.out
    ax = plot_history(history)
    assert [len(line.get_xdata()) for line in ax.lines] == [6, 2]
    plt.close(ax.figure)


def test_precisions_that_are_refused():
    batch = (torch.ones(1, 4, dtype=torch.long),) * 2
    for call in (lambda: evaluate(gpt(), TOKENS, 8, precision="bf16"),
                 lambda: accumulate(gpt(), [batch], "float16")):
        with pytest.raises(ValueError, match="precision must be one of .'float32', 'bfloat16'."):
            call()


# ---- what chapter 16 teaches

class Reads(TorchDispatchMode):
    """Counts how often the CPU asks for a number, for which it would have to wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_larger_accumulation_asks_the_device_no_more_often(optimizer):
    found = []
    for n in (1, 5):
        run = Run(gpt(), config(accumulation_steps=n, optimizer=optimizer))
        batches = run.draw(run, TOKENS)
        with Reads() as reads:
            update(run, batches)
        found.append(reads.count)
    assert found[0] == found[1] > 0


def test_a_compiled_run_makes_the_same_steps(monkeypatch):
    """Only the training pass is compiled, and only where the config says so."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda fn: lambda *args: calls.append(len(args)) or fn(*args))
    histories = [train(gpt(), TOKENS, TOKENS, config(compile=compile, accumulation_steps=2), progress=False)
                 for compile in (False, True)]
    assert without_speed(histories[0]) == without_speed(histories[1]) and calls == [2] * 12
    logits, loss = compiled(gpt())(*Run(gpt(), config()).draw(Run(gpt(), config()), TOKENS)[0])
    assert logits is None and loss.requires_grad


@pytest.mark.slow
def test_the_training_pass_is_one_graph():
    """`fullgraph` raises where Python would have to look at a number in the middle of it."""
    code = """
import functools
torch.compile = functools.partial(torch.compile, backend="eager", fullgraph=True)
from small import TOKENS, config
from llm_book.train import train
for shape in ("gpt2", "qwen3"):
    found = [train(random_model(**SHAPES[shape]), TOKENS, TOKENS, config(compile=compile, max_steps=3),
                   progress=False)[-1]["loss"] for compile in (False, True)]
    assert abs(found[0] - found[1]) < 1e-5, found
print("same")
"""
    assert without_type_checker(code) == ["same"]


@pytest.mark.parametrize("there, back", [("ours", "torch"), ("torch", "ours"), ("torch", "torch")])
def test_a_run_moves_between_our_adamw_and_torchs(tmp_path, there, back):
    """A checkpoint of either continues with either."""
    c, whole = config(), gpt()
    history = train(whole, TOKENS, TOKENS, c, progress=False)

    def run(kind, model):
        groups = [{key: group[key] for key in ("params", "weight_decay", "max_lr")}
                  for group in make_optimizers(model, c)[0].param_groups]
        fused = torch.optim.AdamW(groups, betas=c.betas, fused=True)
        return Run(model, c, [fused] if kind == "torch" else None)

    first, second = run(there, gpt()), run(back, gpt(seed=1))
    for _ in range(3):
        update(first, first.draw(first, TOKENS))
    write_checkpoint(tmp_path, first.state_dict())
    second.load_state_dict(read_checkpoint(checkpoints(tmp_path)[-1]))
    for _ in range(3):
        update(second, second.draw(second, TOKENS))
    torch.testing.assert_close(dict(second.model.named_parameters()), dict(whole.named_parameters()))
    assert [entry["loss"] for entry in second.history] == pytest.approx(
        [entry["loss"] for entry in history[3:]], rel=1e-4)
    assert type(second.optimizers[0]) is (AdamW if back == "ours" else torch.optim.AdamW)
