"""Chapter 15: accumulation, evaluation, checkpoints, and runs that are killed."""
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from torch import nn

import llm_book.train as module
from llm_book.gpt import GPT, GPTConfig
from llm_book.neural_lm import MLPLM
from llm_book.optim import AdamW, Muon, cosine_schedule
from llm_book.train import (
    TrainConfig,
    TrainingDiverged,
    accumulate,
    checkpoints,
    evaluate,
    load_checkpoint,
    make_optimizers,
    plot_history,
    random_state,
    read_checkpoint,
    restore,
    save_checkpoint,
    set_random_state,
    train,
)

TOKENS = np.random.default_rng(0).integers(0, 11, 600)
FILES = ("model.safetensors", "optimizer.safetensors", "checkpoint.json", "SHA256SUMS")


def gpt(dropout=0.0, seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=11, max_len=16, n_layers=1, d_model=8, n_heads=2, dropout=dropout)
    return GPT(GPTConfig(**{**shape, **changes}))


def mlp(**changes):
    return MLPLM(**{**dict(vocab_size=11, context=3, d_embed=4, d_hidden=8), **changes},
                 generator=torch.Generator().manual_seed(0))


def config(**changes):
    small = dict(max_steps=6, batch_size=2, seq_len=8, warmup_steps=2, checkpoint_every=2,
                 eval_every=3, eval_windows=4, max_lr=1e-2, min_lr=1e-3)
    return TrainConfig(**{**small, **changes})


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def without_speed(history):
    return [{key: value for key, value in entry.items() if key != "tokens_per_second"}
            for entry in history]


# ---- accumulation

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
    with pytest.raises(ValueError, match="at least one target that counts"):
        accumulate(model, [(x, torch.full_like(x, -100))])


def test_bfloat16_is_used_and_close():
    x = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))
    full, half = gpt(d_model=32), gpt(d_model=32)
    a, b = accumulate(full, [(x, x)]), accumulate(half, [(x, x)], "bfloat16")
    assert a != b and abs(a - b) < 0.01
    assert {p.grad.dtype for p in half.parameters()} == {torch.float32}
    torch.testing.assert_close(gradient(full), gradient(half), atol=0.02, rtol=0.1)


# ---- configuration

@pytest.mark.parametrize("changes, message", [
    (dict(max_steps=0), "max_steps must be a whole number of at least 1, not 0"),
    (dict(batch_size=-1), "batch_size must"), (dict(seq_len=0), "seq_len must"),
    (dict(accumulation_steps=0), "^accumulation_steps must"), (dict(eval_every=0), "^eval_every must"),
    (dict(checkpoint_every=0), "^checkpoint_every must"), (dict(keep_last=0), "^keep_last must"),
    (dict(keep_last=True), "keep_last must be a whole number"),
    (dict(eval_windows=-1), "eval_windows must be a whole number of at least 0"),
    (dict(seed=2**32), "seed must be at most 4294967295"), (dict(seed=-1), "^seed must"), (dict(max_lr=0.0), "max_lr must be above 0 and finite, not 0.0"),
    (dict(max_lr=math.inf), "^max_lr must"), (dict(max_lr=math.nan), "^max_lr must"),
    (dict(muon_lr=-1.0), "^muon_lr must"), (dict(max_norm=0.0), "max_norm must be above 0, not"),
    (dict(weight_decay=-0.1), "^weight_decay must"), (dict(weight_decay=math.inf), "^weight_decay must"),
    (dict(min_lr=0.1), "min_lr must be from 0 to max_lr = 0.01, not 0.1"),
    (dict(min_lr=-0.1), "^min_lr must"), (dict(warmup_steps=6), "from 0 to max_steps - 1 = 5, not 6"),
    (dict(betas=(0.9, 1.0)), "^betas must"), (dict(schedule="cosinus"), "schedule must be one of"),
    (dict(optimizer="sgd"), "optimizer must be one of"), (dict(precision="half"), "^precision must"),
])
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize("name, value, message", [("max_lr", "1e-3", "max_lr must be a number, not '1e-3'"),
                                                  ("betas", 0.9, "betas must be two numbers")])
def test_values_of_another_type_are_named(name, value, message):
    c = config()
    object.__setattr__(c, name, value)  # as without the type checks of the tests
    with pytest.raises(ValueError, match=message):
        module._refuse_values(c)


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


# ---- evaluation

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


# ---- checkpoints

def trained(optimizer="muon", steps=3):
    """A model and its optimizers after a few steps."""
    model = gpt()
    optimizers = make_optimizers(model, config(optimizer=optimizer))
    for _ in range(steps):
        accumulate(model, [(torch.from_numpy(TOKENS[None, :8]), torch.from_numpy(TOKENS[None, 1:9]))])
        for one in optimizers:
            one.step()
    return model, optimizers


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_gives_back_everything(tmp_path, optimizer):
    model, optimizers = trained(optimizer)
    np.random.seed(2), torch.manual_seed(3)  # Python's dice are thrown by beartype, too
    save_checkpoint(tmp_path, model, optimizers, 3, note=["x", 0.1])
    drawn = np.random.randn(), torch.rand(2).tolist()
    other = gpt(seed=5)
    fresh = make_optimizers(other, config(optimizer=optimizer))
    about = restore(tmp_path, other, fresh)
    assert about["step"] == 3 and about["note"] == ["x", 0.1]
    assert drawn == (np.random.randn(), torch.rand(2).tolist())
    assert same(model.state_dict(), other.state_dict())
    assert all(same(a.state_dict(), b.state_dict()) for a, b in zip(optimizers, fresh))
    assert load_checkpoint(tmp_path / "step_00000003", gpt()) == 3  # weights only


def test_torch_optimizers_buffers_and_shared_weights(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        return model, torch.optim.Adam(model.parameters(), lr=0.1)

    (model, adam), (other, fresh) = make(), make()
    model(torch.randn(4, 3)).sum().backward()
    adam.step()
    save_checkpoint(tmp_path, model, adam, 1)
    assert load_checkpoint(tmp_path, other, fresh) == 1
    assert same(model.state_dict(), other.state_dict())
    assert same(adam.state_dict()["state"], fresh.state_dict()["state"])


def test_the_last_k_are_kept_and_drafts_are_swept(tmp_path):
    (tmp_path / "draft_1").mkdir()
    (tmp_path / "step_x").mkdir()
    model = gpt()
    for step in (1, 2, 10, 100_000_000):
        save_checkpoint(tmp_path, model, None, step, keep_last=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000010", "step_100000000"]
    save_checkpoint(tmp_path, model, None, 20, keep_last=1)  # a later one is not touched
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_100000000",
                                                                 "step_x"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "flip", "other"])
def test_damaged_checkpoints_are_passed_over(tmp_path, name, damage):
    model, optimizers = trained()
    save_checkpoint(tmp_path, model, optimizers, 1)
    newest = save_checkpoint(tmp_path, *trained(steps=4), 2) / name
    data = bytearray(newest.read_bytes())
    if damage == "gone":
        newest.unlink()
    elif damage == "other":
        newest.write_bytes((tmp_path / "step_00000001" / name).read_bytes())
    else:
        data[3] ^= 1
        newest.write_bytes({"cut": data[:-7], "empty": b"", "flip": data}[damage])
    other = gpt(seed=5)
    with pytest.warns(UserWarning, match="passed over: .*step_00000002' is no whole checkpoint"):
        assert load_checkpoint(tmp_path, other, make_optimizers(other, config(optimizer="muon"))) == 1
    assert same(model.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match="no whole checkpoint"):
        load_checkpoint(newest.parent, other)


def test_sha256sum_agrees(tmp_path):
    path = save_checkpoint(tmp_path, *trained(), 1)
    lines = (path / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}"
                     for name in FILES[:3]]


def test_foreign_checkpoints_are_refused_and_nothing_is_changed(tmp_path):
    model, optimizers = trained("adamw")
    save_checkpoint(tmp_path, model, optimizers, 1)
    with pytest.raises(ValueError, match="step must be at least 0, not -5"):
        save_checkpoint(tmp_path, model, optimizers, -5)
    sgd = torch.optim.SGD([{"params": group["params"]} for group in optimizers[0].param_groups], lr=1)
    for other, its, message in (
            (gpt(d_model=16), None, "another model; .* of another shape or dtype: blocks.0"),
            (mlp(), None, "another model"),
            (gpt(seed=5), make_optimizers(gpt(), config(optimizer="muon")), "of other optimizers"),
            (gpt(seed=5), AdamW(gpt().parameters()), "of other optimizers"),
            (gpt(seed=5).double(), None, "of another shape or dtype"),
            (gpt(seed=5), sgd, r"of other optimizers, \['AdamW'\], not \['SGD'\]")):
        before = torch.get_rng_state(), {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path, other, its)
        assert torch.equal(before[0], torch.get_rng_state()) and same(before[1], other.state_dict())
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_checkpoint(tmp_path / "nowhere", model)
    save_checkpoint(tmp_path, gpt(d_model=16), None, 2)  # foreign and newer
    with pytest.warns(UserWarning, match="another model"):
        assert load_checkpoint(tmp_path, model, optimizers) == 1


class Killed(BaseException):
    """As good as SIGKILL for the files: nobody catches it."""


def killer(n):
    """A profiler that dies before the n-th call into the system."""
    calls = 0

    def profile(frame, event, function):
        nonlocal calls
        if event == "c_call" and (function.__module__ == "posix"
                                  or function.__name__ in ("write", "flush", "close")):
            calls += 1
            if calls == n:
                sys.setprofile(None)
                raise Killed

    return profile


@pytest.mark.skipif(os.name != "posix", reason="counts calls into posix")
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path):
    model, optimizers = trained()
    n, finished = 0, False
    while not finished:
        n, place = n + 1, tmp_path / str(n)
        for step in (1, 2):
            save_checkpoint(place, model, optimizers, step, keep_last=2)
        try:
            sys.setprofile(killer(n))
            save_checkpoint(place, model, optimizers, 3, keep_last=1)
            finished = True
        except Killed:
            pass
        finally:
            sys.setprofile(None)
        assert load_checkpoint(place, model, optimizers) in ((3,) if finished else (2, 3))
        for path in checkpoints(place):
            assert read_checkpoint(path)[0]["step"] == int(path.name[5:])  # what has a name is whole
    assert n > 20


# ---- the loop

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


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resumed_equals_undisturbed(tmp_path, stop, monkeypatch):
    """Stops by an exception in the middle of a step; the kills below are real."""
    c = config(optimizer="muon", accumulation_steps=2)
    undisturbed, resumed = gpt(dropout=0.3), gpt(dropout=0.3)
    whole = train(undisturbed, TOKENS, TOKENS, c, out_dir=tmp_path / "a", progress=False)
    draw = module._draw

    def draw_or_die(*arguments):
        if len((tmp_path / "b" / "log.jsonl").read_text().splitlines()) == stop:
            raise Killed
        return draw(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_draw", draw_or_die)
        with pytest.raises(Killed):
            train(resumed, TOKENS, TOKENS, c, out_dir=tmp_path / "b", progress=False)
    again = gpt(dropout=0.3)
    torch.rand(7)
    history = train(again, TOKENS, TOKENS, c, out_dir=tmp_path / "b", progress=False)
    assert without_speed(history) == without_speed(whole)
    assert same(undisturbed.state_dict(), again.state_dict())
    (about, *tensors), (its, *others) = (read_checkpoint(tmp_path / run / "step_00000006") for run in "ab")
    for one in (about, its):
        del one["random"]["python"]  # beartype throws these dice, too
    assert about == its and all(map(same, tensors, others))
    log = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert log == history
    assert train(again, TOKENS, TOKENS, c, out_dir=tmp_path / "b", progress=False) == history  # done


def test_another_run_in_the_folder_is_refused_before_anything_changes(tmp_path):
    train(gpt(), TOKENS, TOKENS, config(), out_dir=tmp_path, progress=False)
    log, model = (tmp_path / "log.jsonl").read_bytes(), gpt(seed=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for changes, resume, message in (
            (dict(max_lr=0.5, batch_size=3), True,
             "changed: batch_size from 2 to 3, max_lr from 0.01 to 0.5"),
            ({}, False, "out_dir must hold no run if resume is False, unlike")):
        with pytest.raises(ValueError, match=message):
            train(model, TOKENS, TOKENS, config(**changes), out_dir=tmp_path, resume=resume,
                  progress=False)
    assert same(before, model.state_dict()) and (tmp_path / "log.jsonl").read_bytes() == log
    more = config(eval_every=1, checkpoint_every=1, keep_last=5, eval_windows=2)  # these are free
    assert len(train(model, TOKENS, TOKENS, more, out_dir=tmp_path, progress=False)) == 6
    (tmp_path / "log.jsonl").write_bytes(log[:50])
    with pytest.raises(ValueError, match="log.jsonl' must reach step 6, as the checkpoint does"):
        train(model, TOKENS, TOKENS, config(), out_dir=tmp_path, progress=False)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path):
    c = config()
    whole = train(gpt(), TOKENS, TOKENS, c, out_dir=tmp_path, progress=False)
    (tmp_path / "step_00000006" / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over"):
        again = train(gpt(seed=9), TOKENS, TOKENS, c, out_dir=tmp_path, progress=False)
    assert without_speed(again) == without_speed(whole)
    assert read_checkpoint(tmp_path / "step_00000006")[0]["step"] == 6


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
    (math.nan, 0.0, "the loss is nan, at step 5, learning rate 0.0055"),
    (math.inf, 0.0, "the loss is inf, at step 5"),
    (1.0, 3e38, "finite norm, not inf, at step 5"),
])
def test_nan_stops_with_an_address(tmp_path, value, slope, message):
    c = config(schedule="linear", eval_every=100, checkpoint_every=2)
    with pytest.raises(TrainingDiverged, match=f"{message}.*last good checkpoint: .*step_00000004"):
        train(Explodes(4, value, slope), TOKENS, TOKENS, c, out_dir=tmp_path, progress=False)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    with pytest.raises(TrainingDiverged, match="last good checkpoint: none"):
        train(Explodes(4, value, slope), TOKENS, TOKENS, c, progress=False)
    (tmp_path / "step_00000004" / "checkpoint.json").write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TrainingDiverged, match="step 3,.*step_00000002"):
            train(Explodes(0, value, slope), TOKENS, TOKENS, c, out_dir=tmp_path, progress=False)


def test_a_loss_that_runs_away_stops():
    c = config(max_steps=60, eval_every=100)
    with pytest.raises(TrainingDiverged, match=r"the mean of the last 20 losses is \d.\d+, and the loss was 1, at step 22"):
        train(Explodes(5, 3.5), TOKENS, TOKENS, c, progress=False)  # mean of 20 above 3
    assert len(train(Explodes(5, 2.9), TOKENS, TOKENS, c, progress=False)) == 60


def test_what_goes_astray_is_not_saved(tmp_path):
    c = config(max_steps=40, eval_every=100, checkpoint_every=5, keep_last=2)
    with pytest.raises(TrainingDiverged, match="the last 10 losses is 5, and the loss was 1, at step 10,.*step_00000005"):
        train(Explodes(5, 9.0), TOKENS, TOKENS, c, out_dir=tmp_path / "a", progress=False)
    fallen = [{"loss": 5.0}, *[{"loss": 1.0, "val_loss": 1.0}] * 25, *[{"loss": 4.0}] * 19]
    module._refuse_divergence(fallen[:-8], {"loss": 4.0}, gpt(), False)
    with pytest.raises(FloatingPointError, match="the last 20 losses is 4, and the loss was 1"):  # below the first one
        module._refuse_divergence(fallen, {"loss": 4.0}, gpt(), False)
    with pytest.raises(FloatingPointError, match="the validation loss is nan"):
        module._refuse_divergence([], {"loss": 1.0, "val_loss": math.nan}, gpt(), False)
    broken = gpt()
    with torch.no_grad():
        broken.head.weight[0, 0] = math.inf
    module._refuse_divergence([], {"loss": 1.0}, broken, False)
    with pytest.raises(FloatingPointError, match="a weight is not finite"):
        module._refuse_divergence([], {"loss": 1.0}, broken, True)


def test_other_tokens_and_other_models_are_another_run(tmp_path):
    train(gpt(), TOKENS, TOKENS, config(), out_dir=tmp_path, progress=False)
    other = TOKENS.copy()
    other[-1] = (other[-1] + 1) % 11
    for arguments, name in (((gpt(), other, TOKENS), "tokens_train"), ((gpt(), TOKENS, other), "tokens_val"),
                            ((gpt(dropout=0.5), TOKENS, TOKENS), "model_config")):
        with pytest.raises(ValueError, match=f"{name} must be that of the run in out_dir"):
            train(*arguments, config(), out_dir=tmp_path, progress=False)


@pytest.mark.parametrize("schedule, fine", [("wsd", True), ("constant", True), ("cosine", False)])
def test_a_run_may_go_on_for_longer_if_its_way_so_far_is_the_same(tmp_path, schedule, fine):
    few, many = (config(max_steps=n, schedule=schedule, keep_last=9, eval_every=50) for n in (10, 20))
    train(gpt(), TOKENS, TOKENS, few, out_dir=tmp_path, progress=False)
    shutil.rmtree(tmp_path / "step_00000010")  # that of step 8 is from before wsd comes down
    model, fresh = gpt(seed=3), gpt()
    if not fine:
        with pytest.raises(ValueError, match="changed: max_steps from 10 to 20"):
            train(model, TOKENS, TOKENS, many, out_dir=tmp_path, progress=False)
        return
    assert len(train(model, TOKENS, TOKENS, many, out_dir=tmp_path, progress=False)) == 20
    train(fresh, TOKENS, TOKENS, many, progress=False)
    assert same(model.state_dict(), fresh.state_dict())


def test_what_changes_the_last_bits_is_said(tmp_path, monkeypatch):
    train(gpt(), TOKENS, TOKENS, config(), out_dir=tmp_path, progress=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.warns(UserWarning, match="threads was .* and is 77: the last bits may differ"):
        train(gpt(), TOKENS, TOKENS, config(), out_dir=tmp_path, progress=False)


def test_a_log_is_not_thrown_away(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="out_dir must hold no run if resume is False"):
        train(gpt(), TOKENS, TOKENS, config(), out_dir=tmp_path, resume=False, progress=False)
    assert (tmp_path / "log.jsonl").read_text()


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


def test_random_state_survives_json():
    random.gauss(0, 1), np.random.randn()  # both have a second number in stock now
    state = json.dumps(random_state())
    drawn = [(random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist()) for _ in range(2)]
    set_random_state(json.loads(state))
    assert drawn == [(random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist())
                     for _ in range(2)]


# ---- real kills

SERVER = '''
"""Imports once; forks a run for each line of input; says its process id and how it ended."""
import os, sys, torch
torch.set_num_threads(1)
import numpy as np
from llm_book.gpt import GPT, GPTConfig
from llm_book.train import TrainConfig, train

def run(folder, optimizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, max_len=16, n_layers=2, d_model=16, n_heads=2, dropout=0.2))
    config = TrainConfig(40, batch_size=2, seq_len=16, warmup_steps=5, accumulation_steps=2,
                         optimizer=optimizer, max_lr=1e-2, eval_every=7, eval_windows=4,
                         checkpoint_every=2)
    tokens = np.random.default_rng(0).integers(0, 11, 600)
    train(model, tokens, tokens, config, out_dir=folder, progress=False)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(*line.strip().split("\\t"))
            status = 0
        finally:
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
'''


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, text=True, bufsize=1,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    yield process
    process.stdin.close()
    process.wait()


def run(server, folder, optimizer, kill_after=None) -> int:
    """One process that trains in `folder`; killed after so many seconds if it still lives."""
    print(f"{folder}\t{optimizer}", file=server.stdin, flush=True)
    child = int(server.stdout.readline())
    if kill_after is not None:
        time.sleep(kill_after)
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return int(server.stdout.readline())


def outcome(folder: Path) -> tuple:
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    files = [(path.name, name, (path / name).read_bytes())
             for path in checkpoints(folder) for name in FILES]
    return without_speed(log), files


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the server forks")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_at_random_moments_it_ends_the_same(server, tmp_path, optimizer):
    rng, kills, runs = random.Random(optimizer), 0, 0
    started = time.perf_counter()
    assert run(server, tmp_path / "undisturbed", optimizer) == 0
    seconds = time.perf_counter() - started
    expected = outcome(tmp_path / "undisturbed")
    assert len(expected[0]) == 40 and len(expected[1]) == 2 * len(FILES)
    while kills < 10:
        runs += 1
        folder, here = tmp_path / f"run{runs}", 0
        while True:  # at most 12 kills in one folder, so that a slow machine comes to an end, too
            status = run(server, folder, optimizer,
                         rng.uniform(0, seconds / 4) if here < 12 else None)
            assert status in (0, -signal.SIGKILL)
            if status == 0:
                break
            here += 1
        kills += here
        assert outcome(folder) == expected
        assert not list(folder.glob("draft_*"))


def test_a_run_that_stops_before_its_first_checkpoint_begins_where_it_began(tmp_path, monkeypatch):
    c, model, twin = config(checkpoint_every=50), gpt(), gpt()
    expected = train(twin, TOKENS, TOKENS, c, progress=False)
    update, count = module._update, []

    def interrupted(*arguments):
        if len(count) == 3:
            raise KeyboardInterrupt
        count.append(1)
        return update(*arguments)

    monkeypatch.setattr(module, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, TOKENS, TOKENS, c, out_dir=tmp_path, progress=False)
    monkeypatch.undo()
    history = train(model, TOKENS, TOKENS, c, out_dir=tmp_path, progress=False)  # the same object
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in expected]
    assert same(twin.state_dict(), model.state_dict())


def test_a_log_of_somebody_else_is_not_cut(tmp_path):
    (tmp_path / "log.jsonl").write_text("notes\n")
    with pytest.raises(ValueError, match="no log without a checkpoint"):
        train(gpt(), TOKENS, TOKENS, config(), out_dir=tmp_path, progress=False)
    assert (tmp_path / "log.jsonl").read_text() == "notes\n" and not checkpoints(tmp_path)


def test_an_optimizer_that_refuses_leaves_the_weights(tmp_path):
    saved, model = gpt(seed=1), gpt()
    theirs = torch.optim.AdamW(saved.parameters(), amsgrad=True)
    accumulate(saved, [(torch.ones(1, 4, dtype=torch.long),) * 2])
    theirs.step()
    save_checkpoint(tmp_path, saved, theirs, 1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="amsgrad must be off"):
        restore(tmp_path, model, AdamW(model.parameters()))
    assert same(before, model.state_dict())


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save_checkpoint(tmp_path, gpt(), None, 3)
    save_checkpoint(tmp_path, gpt(seed=1), None, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
    assert load_checkpoint(tmp_path, model := gpt()) == 3 and same(gpt(seed=1).state_dict(), model.state_dict())


def test_names_and_precisions_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must not be named optimizers, random"):
        save_checkpoint(tmp_path / "x", gpt(), None, 1, random=1, optimizers=2)
    assert not (tmp_path / "x").exists()
    batch = (torch.ones(1, 4, dtype=torch.long),) * 2
    for call in (lambda: evaluate(gpt(), TOKENS, 8, precision="bf16"),
                 lambda: accumulate(gpt(), [batch], "float16")):
        with pytest.raises(ValueError, match="precision must be 'float32' or 'bfloat16'"):
            call()
