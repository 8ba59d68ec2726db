"""Checkpoints: whole or not there, and everything comes back."""
import hashlib
import json
import os
import random
import sys
import threading

import numpy as np
import pytest
import torch
from small import Killed, config, gpt, mlp, same, trained
from torch import nn

from llm_book.checkpoint import (
    checkpoints,
    full_state,
    load_checkpoint,
    random_state,
    read_checkpoint,
    restore,
    save_checkpoint,
    set_random_state,
    write_checkpoint,
)
from llm_book.optim import AdamW
from llm_book.train import accumulate, make_optimizers

FILES = ("model.safetensors", "optimizer.safetensors", "checkpoint.json", "SHA256SUMS")


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


def test_the_last_k_are_kept(tmp_path):
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
    for step in (-5, 3.0, True):
        with pytest.raises(ValueError, match="step must be a whole number of at least 0, not"):
            write_checkpoint(tmp_path, {**full_state(model, optimizers, 1), "step": step})
    sgd = torch.optim.SGD([{"params": group["params"]} for group in optimizers[0].param_groups], lr=1)
    for other, its, message in (
            (gpt(d_model=16), None, "another model; .* of another shape or dtype: blocks.0"),
            (mlp(), None, "another model"),
            (gpt(seed=5), make_optimizers(gpt(), config(optimizer="muon")), "of other optimizers"),
            (gpt(seed=5), AdamW(gpt().parameters()), "of other optimizers"),
            (gpt(seed=5).double(), None, "of another shape or dtype"),
            (gpt(seed=5), sgd, r"of other optimizers or parameters, \['AdamW'\]")):
        before = torch.get_rng_state(), {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path, other, its)
        assert torch.equal(before[0], torch.get_rng_state()) and same(before[1], other.state_dict())
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_checkpoint(tmp_path / "nowhere", model)
    save_checkpoint(tmp_path, gpt(d_model=16), None, 2)  # foreign and newer
    with pytest.warns(UserWarning, match="another model"):
        assert load_checkpoint(tmp_path, model, optimizers) == 1


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
            assert read_checkpoint(path)["step"] == int(path.name[5:])  # what has a name is whole
    assert n > 20


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


def test_random_state_survives_json():
    random.gauss(0, 1), np.random.randn()  # both have a second number in stock now
    state = json.dumps(random_state())
    drawn = [(random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist()) for _ in range(2)]
    set_random_state(json.loads(state))
    assert drawn == [(random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist())
                     for _ in range(2)]


def test_the_state_of_other_parameters_is_refused(tmp_path):
    """As many, and of the same shapes, but not the same ones."""
    model = gpt(n_layers=2)
    for frozen in model.blocks[0].parameters():
        frozen.requires_grad_(False)
    save_checkpoint(tmp_path, model, make_optimizers(model, config()), 4)
    other = gpt(n_layers=2, seed=1)
    for frozen in other.blocks[1].parameters():
        frozen.requires_grad_(False)
    before = {name: weight.clone() for name, weight in other.state_dict().items()}
    with pytest.raises(ValueError, match="of other optimizers or parameters"):
        load_checkpoint(tmp_path, other, make_optimizers(other, config()))
    assert same(before, other.state_dict())


def test_names_that_are_taken_are_refused(tmp_path):
    with pytest.raises(ValueError, match="extra values must be named otherwise, not .*random"):
        save_checkpoint(tmp_path / "x", gpt(), None, 1, random=1)
    assert not (tmp_path / "x").exists()


def test_two_writers_in_one_folder_leave_whole_checkpoints(tmp_path):
    model, optimizers = trained()

    def write(first):
        for step in range(first, first + 20, 2):
            save_checkpoint(tmp_path, model, optimizers, step)

    threads = [threading.Thread(target=write, args=(first,)) for first in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name for path in checkpoints(tmp_path)} >= {"step_00000020"}
    for path in checkpoints(tmp_path):
        assert read_checkpoint(path)["step"] == int(path.name[5:])


@pytest.mark.parametrize("content", ["[]", "{}", '{"step": 1}', "nonsense"])
def test_a_file_that_is_whole_but_no_checkpoint_is_refused(tmp_path, content):
    path = save_checkpoint(tmp_path, gpt(), None, 1)
    (path / "checkpoint.json").write_text(content)
    sums = "".join(f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n"
                   for name in FILES[:3])
    (path / "SHA256SUMS").write_text(sums)
    with pytest.raises(ValueError, match="is no whole checkpoint"):
        restore(path, gpt())
