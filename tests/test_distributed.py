"""Chapter 17: ranks that add up, layouts that agree, workers that are killed."""
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from llm_book.checkpoint import checkpoints, read_checkpoint
from llm_book.distributed import (
    Place,
    accumulate_ranks,
    all_reduce_seconds,
    cluster_seconds,
    distribute,
    draw_rows,
    main,
    ring_all_reduce,
    ring_moves,
    setup,
    train_distributed,
    wrap,
)
from llm_book.gpt import GPT, GPTConfig
from llm_book.text import split_text
from llm_book.train import (
    Run,
    TrainConfig,
    TrainingDiverged,
    accumulate,
    draw_batches,
    evaluate,
    train,
)

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TOKENS = np.random.default_rng(0).integers(0, 11, 600)


def gpt(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**dict(vocab_size=11, max_len=8, n_layers=2, d_model=16, n_heads=2), **changes}))


def config(**changes):
    return TrainConfig(**{**dict(max_steps=8, batch_size=4, seq_len=8, warmup_steps=2, max_lr=1e-2,
                                 accumulation_steps=2, checkpoint_every=4, eval_every=4,
                                 eval_windows=4, keep_last=9), **changes})


def losses(history):
    return [entry["loss"] for entry in history]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- one process

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes have
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone():
    saved = {name: os.environ.pop(name, None) for name in TORCHRUN}
    place = setup()
    yield place
    dist.destroy_process_group()
    os.environ.update({name: value for name, value in saved.items() if value is not None})


@given(st.integers(1, 9), st.data())
def test_the_ring_sums(p, data):
    """The timetable, played on lists: each worker sends what its neighbour expects."""
    state = [data.draw(st.lists(st.integers(-9, 9), min_size=p, max_size=p)) for _ in range(p)]
    total = [sum(column) for column in zip(*state)]
    moves = [ring_moves(rank, p) for rank in range(p)]
    assert {len(one) for one in moves} == {2 * (p - 1)}
    for step in range(2 * (p - 1)):
        before = [list(row) for row in state]
        for rank in range(p):
            _, chunk, add = moves[rank][step]
            assert moves[(rank - 1) % p][step][0] == chunk and add == (step < p - 1)
            arrived = before[(rank - 1) % p][chunk]
            state[rank][chunk] = arrived + (before[rank][chunk] if add else 0)
    assert state == [total] * p


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_wrap_comes_after_setup(mode):
    assert not dist.is_initialized()
    with pytest.raises((ValueError, RuntimeError), match="has not been initialized"):  # torch's own
        wrap(gpt(), mode)


def test_alone_is_a_group_of_one(alone):
    assert (alone.rank, alone.world_size, alone.local_rank) == (0, 1, 0)
    x = torch.arange(3.0)
    ring_all_reduce(x)
    assert x.tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match="view size is not compatible"):  # torch's own
        ring_all_reduce(torch.ones(2, 2).T)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_setup_refuses_half_an_environment(monkeypatch, name):
    for other in TORCHRUN:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "0")
    with pytest.raises(ValueError, match="must be set by torchrun, or not at all"):
        setup()


def test_wrap_refuses(alone):
    with pytest.raises(ValueError, match=r"mode must be one of \('ddp', 'fsdp'\), not 'zero'"):
        wrap(gpt(), "zero")


@pytest.mark.parametrize("changes, mode, p, message", [
    ({}, "zero", 1, "mode must be one of"),
    (dict(compile=True), "ddp", 1, "compile must be False for several processes"),
    ({}, "ddp", 3, "batch_size must be divisible by the number of processes, 3, not 4"),
    (dict(optimizer="muon"), "fsdp", 2, "optimizer must be 'adamw' in mode 'fsdp', .* not 'muon'"),
])
def test_layouts_that_cannot_be_are_refused_before_anything_happens(tmp_path, changes, mode, p, message):
    place = Place(0, p, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        train_distributed(gpt(), TOKENS, TOKENS, config(**changes), place, mode=mode, out_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("mode, optimizer", [("ddp", "adamw"), ("ddp", "muon"), ("fsdp", "adamw")])
def test_one_process_is_chapter_15(alone, tmp_path, mode, optimizer):
    c, model, peer = config(optimizer=optimizer), gpt(), gpt()
    history = train_distributed(model, TOKENS, TOKENS, c, alone, mode=mode, out_dir=tmp_path / "a")
    expected = train(peer, TOKENS, TOKENS, c, out_dir=tmp_path / "b", progress=False)
    np.testing.assert_allclose(losses(history), losses(expected), atol=1e-6)
    assert history == log_of(tmp_path / "a") and history[0].keys() == expected[0].keys()
    assert [e["step"] for e in history if "val_loss" in e] == [4, 8]
    torch.testing.assert_close(model.state_dict(), peer.state_dict(), atol=1e-5, rtol=0)
    assert train_distributed(gpt(), TOKENS, TOKENS, c, alone, mode=mode, out_dir=tmp_path / "a") == history
    with pytest.raises(ValueError, match="config must be that of the run in out_dir; changed: max_lr"):
        train_distributed(gpt(), TOKENS, TOKENS, config(optimizer=optimizer, max_lr=0.5), alone,
                          out_dir=tmp_path / "a")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_an_evaluation_changes_no_gradient(alone, mode):
    """FSDP leaves the outermost weights whole after a forward pass, and `zero_grad` missed them."""
    batches, model = [(torch.ones(2, 8, dtype=torch.long),) * 2], wrap(gpt(), mode)
    norms = []
    for _ in range(3):
        model.zero_grad()
        accumulate_ranks(model, batches)
        norms.append([getattr(p.grad, "full_tensor", lambda p=p: p.grad)().norm().item()
                      for p in model.parameters()])
        evaluate(model, TOKENS, 8, batch_size=4, n_windows=4)
    assert norms[0] == norms[1] == norms[2]


def test_accumulation_on_one_process(alone):
    x = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(0))
    y = x.where(torch.arange(8) < torch.tensor([8, 3, 0, 0])[:, None], -100)
    batches = list(zip(x.split(2), y.split(2)))  # the second has no targets
    for mode in ("ddp", "fsdp"):
        plain, wrapped = gpt(), wrap(gpt(), mode)
        assert math.isclose(accumulate_ranks(wrapped, batches), accumulate(plain, batches), rel_tol=1e-6)
        for p, q in zip(wrapped.parameters(), plain.parameters()):
            torch.testing.assert_close(getattr(p.grad, "full_tensor", lambda p=p: p.grad)(), q.grad)
        with pytest.raises(ValueError, match="at least one target that counts"):
            accumulate_ranks(wrapped, batches[1:])


def test_divergence_stops(alone):
    class Explodes(GPT):
        def forward(self, ids, targets=None, cache=None):
            logits, loss = super().forward(ids, targets, cache)
            return logits, loss * math.nan if self.training else loss

    torch.manual_seed(0)
    with pytest.raises(TrainingDiverged, match="the loss must be finite, not nan, at step 1"):
        train_distributed(Explodes(gpt().config), TOKENS, TOKENS, config(), alone)


def test_torchs_own_gathering_agrees(alone):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    run = distribute(Run(gpt(), config()), "fsdp", alone.device)
    accumulate_ranks(run.model, [(torch.ones(2, 8, dtype=torch.long),) * 2])
    run.optimizers[0].step()
    weights, state = get_state_dict(run.model, run.optimizers, options=StateDictOptions(
        full_state_dict=True, cpu_offload=True))
    run.state_dict()
    plain = run.plain
    torch.testing.assert_close(dict(plain.model.state_dict()), weights, atol=0, rtol=0)
    for name, p in plain.model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(plain.optimizers[0].state[p][key], state["state"][name][key]), (name, key)


def test_alone_all_rows_are_mine(alone):
    """What the ranks draw is chapter 15's mini-batch; alone one draws all of it."""
    mine, all_rows = draw_rows(Run(gpt(), config()), TOKENS), draw_batches(Run(gpt(), config()), TOKENS)
    assert len(mine) == 2
    torch.testing.assert_close(mine, all_rows)


# ---- the cost of it

@given(p=st.integers(2, 500), alpha=st.floats(1e-7, 1e-3), beta=st.floats(1e-12, 1e-7))
def test_the_benchmark_finds_alpha_and_beta_again(p, alpha, beta):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from distributed import fit_alpha_beta
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    sizes = [64, 4e3, 2e5, 1e7, 1e9]
    found = fit_alpha_beta(sizes, [all_reduce_seconds(n, p, alpha, beta) for n in sizes], p)
    np.testing.assert_allclose(found, (alpha, beta), rtol=1e-4)


@given(st.floats(1e6, 1e12), st.integers(1, 4096))
def test_levels_of_a_cluster(n, k):
    """What crosses a card, counted in another way: 8 cards share 2 (k - 1) / k of the bytes."""
    inside, across = cluster_seconds(n, k)
    assert math.isclose(inside, 2 * 7 * 3e-6 + 2 * 7 / 8 * n / 450e9)
    assert math.isclose(across, 2 * (k - 1) * 10e-6 + 2 * (k - 1) / k * n / 400e9, abs_tol=1e-12)


def test_published_numbers():
    """64 GPUs move 496 MB in about 2.3 ms; Bekman, 2026, measured 22.05 ms for 4 GiB on 4 nodes."""
    assert 2.2e-3 < max(cluster_seconds(496e6, 8)) < 2.4e-3
    inside, across = all_reduce_seconds(2**32, 8, 3e-6, 1 / 900e9), cluster_seconds(2**32, 4)[1]
    assert max(inside, across) < 22.05e-3 < inside + across


def test_the_cost_formula():
    assert all_reduce_seconds(1e6, 1, 1.0, 1.0) == 0
    assert math.isclose(all_reduce_seconds(1e6, 2, 1e-5, 1e-9), 2 * (1e-5 + 0.5e-3))
    assert math.isclose(all_reduce_seconds(1e6, 8, 1e-5, 1e-9, "tree"), 6e-5 + 2e-3)
    with pytest.raises(ValueError, match="shape must be 'ring' or 'tree', not 'star'"):
        all_reduce_seconds(1, 2, 1, 1, "star")


# ---- what the page defines and does not export

def page_code(*names: str) -> str:
    """The cells of the page that define some functions."""
    page = nbformat.read(ROOT / "nbs" / "17_distributed.ipynb", as_version=4)
    return "\n\n".join(cell.source for cell in page.cells if cell.cell_type == "code"
                       and any(cell.source.startswith(f"def {name}(") for name in names))


@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from(["gpipe", "1f1b"]))
def test_timetables(p, m, schedule):
    page: dict = {}
    exec(page_code("pipeline_order"), page)
    plan = page["timetable"](p, m, schedule)
    ends = {(way, i, stage): end for stage, tasks in enumerate(plan) for way, i, _, end in tasks}
    for stage, tasks in enumerate(plan):
        assert sorted(tasks)[:m] == sorted(task for task in tasks if task[0] == "backward")
        assert [task[1] for task in tasks if task[0] == "forward"] == list(range(m))
        assert all(a[3] <= b[2] for a, b in zip(tasks, tasks[1:]))
        for way, i, start, end in tasks:
            assert end - start == (1 if way == "forward" else 2)
            before = (way, i, stage - 1) if way == "forward" else (way, i, stage + 1)
            assert start >= ends.get(before, 0)
            if way == "backward":
                assert start >= ends["forward", i, stage]
    assert max(ends.values()) == 3 * (m + p - 1)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for name in ("mode", "text", "out-dir", "n-layers", "max-steps", "accumulation-steps", "betas", "seed"):
        assert f"--{name}" in shown
    assert "--compile" not in shown
    with pytest.raises(SystemExit):
        main(["--mode", "zero"])
    with pytest.raises(ValueError, match="max_steps must be a whole number of at least 1, not 0"):
        main(["--max-steps", "0"])


# ---- two processes: everything in one launch

SCENARIOS = '''
import json, shutil, sys
from pathlib import Path
import copy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import llm_book.train as loop
from llm_book.distributed import (ColumnParallelLinear, RowParallelLinear, accumulate_ranks,
                                  ring_all_reduce, setup, train_distributed, wrap)
from llm_book.optim import AdamW
from torch import nn
from torch.distributed.tensor import distribute_tensor
sys.path.insert(0, sys.argv[2])
from test_distributed import TOKENS, config, gpt, page_code

place, folder, found = setup(), Path(sys.argv[1]), {}

# a pair of layers, with and without bias; the hidden width cannot be halved
found["pair"] = []
for bias in (True, False):
    torch.manual_seed(0)
    up, down = nn.Linear(5, 7, bias), nn.Linear(7, 3, bias)
    x = torch.randn(2, 4, 5, requires_grad=True)
    down(F.gelu(up(x))).square().sum().backward()
    column, row, z = ColumnParallelLinear(up), RowParallelLinear(down), x.detach().requires_grad_()
    y = row(F.gelu(column(z)))
    y.square().sum().backward()
    part = lambda whole, dim: whole.tensor_split(2, dim)[place.rank]
    pairs = [(y, down(F.gelu(up(x)))), (z.grad, x.grad), (column.weight.grad, part(up.weight.grad, 0)),
             (row.weight.grad, part(down.weight.grad, 1))]
    if bias:
        pairs += [(column.bias.grad, part(up.bias.grad, 0)), (row.bias.grad, down.bias.grad)]
    found["pair"] += [torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6) for ours, theirs in pairs]

# a pipeline of two stages, from the page
exec(page_code("pipeline_order", "received"))
torch.manual_seed(1)
layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)]
inputs, targets = torch.randn(12, 6), torch.randn(12, 6)
F.mse_loss(nn.Sequential(*layers)(inputs), targets).backward()
whole = F.mse_loss(nn.Sequential(*layers)(inputs), targets).item()
found["pipeline"] = []
for schedule in ("gpipe", "1f1b"):
    for rows in (12, 3, 1):  # one micro-batch, four, twelve
        stage = copy.deepcopy(layers[place.rank])
        stage.zero_grad()
        loss = pipeline_step(stage, list(zip(inputs.split(rows), targets.split(rows))), F.mse_loss,
                             (rows, 6), schedule)
        found["pipeline"] += [abs(loss - whole * (place.rank == 1)) < 1e-6] + [
            torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7)
            for p, q in zip(stage.parameters(), layers[place.rank].parameters())]
every = [None, None]
dist.all_gather_object(every, [found["pair"], found["pipeline"]])
found["parts"] = every

# the ring and torch's own
generator = torch.Generator().manual_seed(place.rank)
found["ring"] = []
for shape in ((1,), (2,), (7,), (3, 5), (1000,), (0,)):
    x = torch.randn(shape, generator=generator)
    y = x.clone()
    ring_all_reduce(x)
    dist.all_reduce(y)
    found["ring"].append(torch.allclose(x, y, rtol=0, atol=1e-6))

# ragged targets; rank 1 has none at all in the last case
ids = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(0))
for name, lengths in (("ragged", (8, 1, 2, 7)), ("empty", (8, 0, 3, 0))):
    targets = ids.where(torch.arange(8) < torch.tensor(lengths)[:, None], -100)
    for mode in ("ddp", "fsdp"):
        model = wrap(gpt(), mode)
        rows = slice(place.rank, None, 2)
        loss = accumulate_ranks(model, [(ids[rows], targets[rows])])
        grads = [getattr(p.grad, "full_tensor", lambda: p.grad)() for p in model.parameters()]
        found[f"{name}_{mode}"] = [loss, [g.norm().item() for g in grads]]

# a matrix that chapter 7 updates in slices on a CPU; a slice of a DTensor is a copy
generator = torch.Generator().manual_seed(1)
weight, grad = torch.randn(2, 20_001, 16, generator=generator)
layers = [torch.nn.Linear(16, 20_001, bias=False) for _ in range(2)]
for layer in layers:
    layer.weight.data.copy_(weight)
part, whole = wrap(layers[0], "fsdp").weight, layers[1].weight
part.grad, whole.grad = distribute_tensor(grad, part.device_mesh, part.placements), grad
optimizers = AdamW([part], lr=0.1), AdamW([whole], lr=0.1)
for _ in range(2):
    for optimizer in optimizers:
        optimizer.step()
found["large"] = (part.full_tensor() - whole).abs().max().item()

# every layout from the beginning, and from every other layout's checkpoint
for mode in ("ddp", "fsdp"):
    train_distributed(gpt(), TOKENS, TOKENS, config(), place, mode=mode, out_dir=folder / mode)
for start, mode in (("one", "ddp"), ("one", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")):
    run = folder / f"{start}_{mode}"
    if place.rank == 0:
        shutil.copytree(folder / start, run)
        shutil.rmtree(run / "step_00000008")
    dist.barrier()
    train_distributed(gpt(), TOKENS, TOKENS, config(), place, mode=mode, out_dir=run)

# first weights that differ are those of rank 0
for mode in ("ddp", "fsdp"):
    model = gpt()
    with torch.no_grad():
        for p in model.parameters():
            p += place.rank
    history = train_distributed(model, TOKENS, TOKENS, config(), place, mode=mode)
    found[f"rank0_{mode}"] = [entry["loss"] for entry in history]

# dropout: other dice on each rank, the same again in a second run
for name in ("dropout", "dropout_again"):
    history = train_distributed(gpt(dropout=0.3), TOKENS, TOKENS, config(), place)
    found[name] = [entry["loss"] for entry in history]
try:
    train_distributed(gpt(), TOKENS, TOKENS, config(batch_size=5), place)
except ValueError as error:
    found["refused"] = str(error)
# a weight that is no number, in the part of rank 1 only: all must stop
def update_and_spoil(run, batches, update=loop.update):
    entry = update(run, batches)
    if place.rank == 1 and entry["step"] == 8:
        with torch.no_grad():
            run.model.blocks[0].attention.q_proj.weight.to_local()[0, 0] = torch.nan
    return entry

loop.update = update_and_spoil
try:
    train_distributed(gpt(), TOKENS, TOKENS, config(eval_every=5), place, mode="fsdp", out_dir=folder / "nan")
except loop.TrainingDiverged as error:
    found["nan"] = str(error)
if place.rank == 0:
    (folder / "found.json").write_text(json.dumps(found))
dist.destroy_process_group()
'''
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}


def environment(**more):
    clean = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**clean, "PYTHONPATH": path, **QUIET, **more}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process, by chapter 15."""
    folder = tmp_path_factory.mktemp("runs")
    train(gpt(), TOKENS, TOKENS, config(), out_dir=folder / "one", progress=False)
    return folder


@pytest.fixture(scope="module")
def two(one):
    (one / "scenarios.py").write_text(SCENARIOS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         one / "scenarios.py", one, ROOT / "tests"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((one / "found.json").read_text())


def test_the_ring_equals_torchs_all_reduce(two):
    assert two["ring"] == [True] * 6


def test_layers_and_stages_on_two_processes_are_those_of_one(two):
    for pair, pipeline in two["parts"]:
        assert pair == [True] * 10 and pipeline == [True] * 18


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("name, lengths", [("ragged", (8, 1, 2, 7)), ("empty", (8, 0, 3, 0))])
def test_ranks_weigh_what_they_hold(two, name, lengths, mode):
    ids = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(0))
    targets, model = ids.where(torch.arange(8) < torch.tensor(lengths)[:, None], -100), gpt()
    loss = model(ids, targets)[1]
    loss.backward()
    found, norms = two[f"{name}_{mode}"]
    assert math.isclose(found, loss.item(), rel_tol=1e-6)
    np.testing.assert_allclose(norms, [p.grad.norm().item() for p in model.parameters()],
                               rtol=1e-4, atol=1e-7)


def test_large_matrices_are_updated_where_they_are(two):
    assert two["large"] < 1e-6


@pytest.mark.parametrize("run", ["ddp", "fsdp", "one_ddp", "one_fsdp", "ddp_fsdp", "fsdp_ddp",
                                 "ddp_one", "fsdp_one"])
def test_any_layout_resumes_any_other(one, two, run):
    if run.endswith("_one"):
        shutil.copytree(one / run[:-4], one / run)
        shutil.rmtree(one / run / "step_00000008")
        train(gpt(), TOKENS, TOKENS, config(), out_dir=one / run, progress=False)
    np.testing.assert_allclose(losses(log_of(one / run)), losses(log_of(one / "one")), rtol=0, atol=1e-5)
    ours, its = (read_checkpoint(one / name / "step_00000008") for name in (run, "one"))
    for name in ("step", "config", "generator", "param_groups", "parameters", "kinds"):
        assert ours[name] == its[name], name
    torch.testing.assert_close(ours["model"], its["model"], atol=1e-4, rtol=0)
    for moments, expected in zip(ours["optimizers"], its["optimizers"]):
        torch.testing.assert_close(moments["state"], expected["state"], atol=1e-5, rtol=1e-3)


def test_first_weights_are_those_of_rank_0(one, two):
    for name in ("rank0_ddp", "rank0_fsdp"):
        np.testing.assert_allclose(two[name], losses(log_of(one / "one")), rtol=0, atol=1e-5)


def test_dropout_is_repeatable_and_unequal_rows_are_refused(one, two):
    assert two["dropout"] == two["dropout_again"] != losses(log_of(one / "one"))
    assert "divisible by the number of processes, 2, not 5" in two["refused"]


def test_a_weight_that_is_no_number_on_one_rank_stops_all(one, two):
    # torch's attention on a CPU loses a nan in short rows; then the checkpoint's check finds the weight
    assert ("the validation loss is nan, at step 8" in two["nan"]
            or "weights are not finite: blocks.0.attention.q_proj.weight, at step 8" in two["nan"])
    assert "step_00000004" in two["nan"]
    assert [path.name for path in checkpoints(one / "nan")] == ["step_00000000", "step_00000004"]


# ---- the launch files, and a worker that is killed

OPTIONS = ("--max-steps 40 --checkpoint-every 10 --warmup-steps 5 --batch-size 6 --seq-len 16 "
           "--n-layers 1 --d-model 16 --n-heads 2 --eval-windows 8 --max-lr 0.003").split()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the command does, by hand and in one process."""
    folder = tmp_path_factory.mktemp("command")
    text = "".join(f"{n} times {n} is {n * n}.\n" for n in range(400))
    (folder / "text.txt").write_text(text)
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 16, 1, 16, 2))
    parts = [np.array(list(part.encode()), np.uint16) for part in split_text(text, boundary="\n")[:2]]
    c = TrainConfig(40, checkpoint_every=10, warmup_steps=5, batch_size=6, seq_len=16, eval_windows=8,
                    max_lr=3e-3)
    train(model, *parts, c, out_dir=folder / "one", progress=False)
    return folder


def workers(marker: str) -> dict[int, int]:
    """Process ids of the workers that carry a marker in their environment, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(item.partition("=")[::2] for item in
                             (path / "environ").read_bytes().decode(errors="replace").split("\0"))
        except OSError:
            continue
        if variables.get("LLM_BOOK_TEST") == marker and "TORCHELASTIC_RUN_ID" in variables:
            found[int(variables["RANK"])] = int(path.name)
    return found


def run_and_kill(command: list, out_dir: Path, victim: int, **more) -> str:
    """Run to the end, with a rank killed after 15 steps; what it printed."""
    marker = f"{os.getpid()} {out_dir}"
    with subprocess.Popen(list(map(str, command)), env=environment(LLM_BOOK_TEST=marker, **more), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            log = out_dir / "log.jsonl"
            while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 15):
                time.sleep(0.005)
            if process.poll() is None:
                os.kill(workers(marker)[victim], signal.SIGKILL)
            shown, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, shown
    return shown


def same_run(folder: Path, shown: str, run: str, attempt: str) -> None:
    assert attempt in shown and "step 40: validation" in shown
    assert [entry["step"] for entry in log_of(folder / run)] == list(range(1, 41))
    np.testing.assert_allclose(losses(log_of(folder / run)), losses(log_of(folder / "one")), rtol=0, atol=1e-5)
    ours, its = (read_checkpoint(checkpoints(folder / name)[-1])["model"] for name in (run, "one"))
    torch.testing.assert_close(ours, its, atol=1e-3, rtol=0)


linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for workers in /proc")


@linux
def test_one_node_file_and_a_killed_worker(undisturbed):
    run = undisturbed / "node"
    shown = run_and_kill([ROOT / "launch" / "torchrun_one_node.sh", "--mode", "ddp", "--out-dir", run,
                          "--text", undisturbed / "text.txt", *OPTIONS],
                         run, 0, NPROC="2", MAX_RESTARTS="1")
    same_run(undisturbed, shown, "node", "attempt 2: 2 × cpu, ddp")


SRUN = '''#!/usr/bin/env bash
# Two "machines" on one: the same command twice.
[[ $1 == --kill-on-bad-exit=1 ]] && shift
"$@" & "$@" & wait %1 && wait %2
'''


@linux
def test_slurm_file_and_a_killed_worker(undisturbed, tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", "#!/usr/bin/env bash\necho localhost\necho other\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = undisturbed / "slurm"
    shown = run_and_kill(["bash", ROOT / "launch" / "slurm.sbatch", "--mode", "fsdp", "--out-dir", run,
                          "--text", undisturbed / "text.txt", *OPTIONS], run, 1,
                         PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", NPROC="1", PORT=str(port),
                         SLURM_NNODES="2", SLURM_JOB_ID="17", SLURM_JOB_NODELIST="localhost,other")
    same_run(undisturbed, shown, "slurm", "2 × cpu, fsdp")
    assert shown.count("2 × cpu, fsdp") == 2


def test_launch_files_are_shell_and_the_page_shows_them():
    page = nbformat.read(ROOT / "nbs" / "17_distributed.ipynb", as_version=4)
    prose = "\n".join(cell.source for cell in page.cells if cell.cell_type == "markdown")
    shown = [block.split("\n```")[0] for block in prose.split("```bash\n")[1:]]
    files = sorted((ROOT / "launch").iterdir())
    assert [path.name for path in files] == ["slurm.sbatch", "torchrun_one_node.sh"]
    for path in files:
        subprocess.run(["bash", "-n", path], check=True)
        assert sum(block in path.read_text() for block in shown) == 1, path.name
        assert path.read_text().split("set -euo pipefail\n")[1].strip() in prose
