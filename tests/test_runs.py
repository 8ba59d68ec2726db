"""A run and its folder: resumed, killed, refused."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from small import TOKENS, Killed, config, gpt, same, without_speed
from torch import nn

from llm_book.checkpoint import AnotherRun, checkpoints, read_checkpoint
from llm_book.runs import RunFolder, describe, kept
from llm_book.train import Run, TrainingDiverged, draw_batches, steps, train

FILES = ("model.safetensors", "optimizer.safetensors", "checkpoint.json", "SHA256SUMS")


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resumed_equals_undisturbed(tmp_path, stop):
    """Stops by an exception in the middle of a step; the kills below are real."""
    c = config(optimizer="muon", accumulation_steps=2)
    undisturbed, resumed = gpt(dropout=0.3), gpt(dropout=0.3)
    whole = train(undisturbed, TOKENS, TOKENS, c, out_dir=tmp_path / "a", progress=False)

    def draw_or_die(run, tokens):
        if run.step == stop:
            raise Killed
        return draw_batches(run, tokens)

    torch.manual_seed(c.seed)
    run = Run(resumed, c, draw=draw_or_die)
    with RunFolder(tmp_path / "b", describe(run, TOKENS, TOKENS), c.keep_last) as folder:
        with pytest.raises(Killed):
            list(kept(folder, run, steps(run, TOKENS, TOKENS)))
    again = gpt(dropout=0.3)
    torch.rand(7)
    history = train(again, TOKENS, TOKENS, c, out_dir=tmp_path / "b", progress=False)
    assert without_speed(history) == without_speed(whole)
    assert same(undisturbed.state_dict(), again.state_dict())
    one, other = (read_checkpoint(tmp_path / run / "step_00000006") for run in "ab")
    for state in (one, other):
        del state["random"]["python"]  # beartype draws from this generator, too
    assert same(one, other)
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
            ({}, False, "out_dir must be a folder without a run where resume is False")):
        with pytest.raises(ValueError, match=message):
            train(model, TOKENS, TOKENS, config(**changes), out_dir=tmp_path, resume=resume,
                  progress=False)
    assert same(before, model.state_dict()) and (tmp_path / "log.jsonl").read_bytes() == log
    more = config(eval_every=1, checkpoint_every=1, keep_last=5, eval_windows=2)  # these are free
    assert len(train(model, TOKENS, TOKENS, more, out_dir=tmp_path, progress=False)) == 6
    (tmp_path / "log.jsonl").write_bytes(log[:50])
    with pytest.raises(ValueError, match="log.jsonl must be a log of the steps 1 to 6, as the checkpoint is"):
        train(model, TOKENS, TOKENS, config(), out_dir=tmp_path, progress=False)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path):
    c = config()
    whole = train(gpt(), TOKENS, TOKENS, c, out_dir=tmp_path, progress=False)
    (tmp_path / "step_00000006" / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over"):
        again = train(gpt(seed=9), TOKENS, TOKENS, c, out_dir=tmp_path, progress=False)
    assert without_speed(again) == without_speed(whole)
    assert read_checkpoint(tmp_path / "step_00000006")["step"] == 6


def test_what_goes_astray_is_not_saved(tmp_path):
    class Breaks(nn.Module):
        """Its weights become inf in the fifth pass, while loss and gradient stay finite."""

        def __init__(self):
            super().__init__()
            self.weight, self.left = nn.Parameter(torch.zeros(2)), 5

        def forward(self, ids, targets):
            self.left -= 1
            if self.left == 0:
                self.weight.data[0] = math.inf
            return None, 1 + (self.weight * 0).nan_to_num().sum()

    c = config(max_steps=10, eval_every=100, checkpoint_every=2)
    with pytest.raises(TrainingDiverged, match="weights are not finite: weight, at step 6; "
                       "last good checkpoint: .*step_00000004"):
        train(Breaks(), TOKENS, TOKENS, c, out_dir=tmp_path, progress=False)
    assert checkpoints(tmp_path)[-1].name == "step_00000004"


def test_broken_first_weights_are_not_saved_and_poison_nothing(tmp_path):
    broken = gpt()
    with torch.no_grad():
        broken.embedding.weight[3] = math.nan
    with pytest.raises(TrainingDiverged, match="weights are not finite: embedding.weight, at step 0; "
                       "last good checkpoint: none"):
        train(broken, TOKENS, TOKENS, config(), out_dir=tmp_path, progress=False)
    assert not checkpoints(tmp_path)
    assert len(train(gpt(), TOKENS, TOKENS, config(), out_dir=tmp_path, progress=False)) == 6


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
    with pytest.raises(ValueError, match="out_dir must be a folder without a run where resume is False"):
        train(gpt(), TOKENS, TOKENS, config(), out_dir=tmp_path, resume=False, progress=False)
    assert (tmp_path / "log.jsonl").read_text()


def test_a_log_of_somebody_else_is_not_cut(tmp_path):
    (tmp_path / "log.jsonl").write_text("notes\n")
    with pytest.raises(ValueError, match="holds a log without a checkpoint"):
        train(gpt(), TOKENS, TOKENS, config(), out_dir=tmp_path, progress=False)
    assert (tmp_path / "log.jsonl").read_text() == "notes\n" and not checkpoints(tmp_path)


def test_a_run_that_stops_before_its_first_checkpoint_begins_where_it_began(tmp_path):
    c, model, twin = config(checkpoint_every=50), gpt(), gpt()
    expected = train(twin, TOKENS, TOKENS, c, progress=False)

    def interrupted(run, tokens):
        if run.step == 3:
            raise KeyboardInterrupt
        return draw_batches(run, tokens)

    run = Run(model, c, draw=interrupted)
    with RunFolder(tmp_path, describe(run, TOKENS, TOKENS)) as folder:
        with pytest.raises(KeyboardInterrupt):
            list(kept(folder, run, steps(run, TOKENS, TOKENS)))
    history = train(model, TOKENS, TOKENS, c, out_dir=tmp_path, progress=False)  # the same object
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in expected]
    assert same(twin.state_dict(), model.state_dict())


def test_a_second_trainer_is_refused_and_a_third_is_not(tmp_path):
    c, run = config(), Run(gpt(), config())
    with RunFolder(tmp_path, describe(run, TOKENS, TOKENS)) as folder:
        entries = kept(folder, run, steps(run, TOKENS, TOKENS))
        next(entries)
        with pytest.raises(AnotherRun, match="in use by another trainer"):
            train(gpt(), TOKENS, TOKENS, c, out_dir=tmp_path, progress=False)
        assert len(list(entries)) == 5
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6
    assert len(train(gpt(), TOKENS, TOKENS, c, out_dir=tmp_path, progress=False)) == 6


def test_drafts_of_a_killed_run_are_swept(tmp_path):
    (tmp_path / "draft_step_00000002.abc").mkdir()
    train(gpt(), TOKENS, TOKENS, config(), out_dir=tmp_path, progress=False)
    assert not list(tmp_path.glob("draft_*"))


@pytest.mark.parametrize("damage", ["twice", "swapped", "list", "gone"])
def test_a_log_whose_steps_are_not_in_order_is_refused(tmp_path, damage):
    train(gpt(), TOKENS, TOKENS, config(), out_dir=tmp_path, progress=False)
    path = tmp_path / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join({"twice": lines[:1] + lines, "swapped": [lines[1], lines[0], *lines[2:]],
                             "list": ["[]\n", *lines[1:]], "gone": lines[1:]}[damage]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="log.jsonl must be a log of the steps 1 to"):
        train(gpt(), TOKENS, TOKENS, config(), out_dir=tmp_path, progress=False)
    assert path.read_bytes() == before


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    few, many = (config(max_steps=n, schedule="constant", eval_every=50) for n in (3, 6))
    train(gpt(), TOKENS, TOKENS, many, out_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="changed: max_steps from 6 to 3"):
        train(gpt(), TOKENS, TOKENS, few, out_dir=tmp_path, progress=False)


def test_a_config_that_fails_before_its_first_step_can_be_corrected(tmp_path):
    wrong, right = config(seq_len=17), config(optimizer="muon", seed=3)  # the model reads up to 16
    with pytest.raises((ValueError, IndexError)):
        train(gpt(), TOKENS, TOKENS, wrong, out_dir=tmp_path, progress=False)
    history = train(gpt(), TOKENS, TOKENS, right, out_dir=tmp_path, progress=False)
    assert without_speed(history) == without_speed(train(gpt(), TOKENS, TOKENS, right, progress=False))
    assert read_checkpoint(tmp_path / "step_00000006")["config"]["seq_len"] == 8


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
