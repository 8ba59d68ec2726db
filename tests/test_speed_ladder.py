"""The speed ladder of chapter 16, in benchmarks/: its proof, the ledger, the command line."""
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from llm_book.gpt import GPT, GPTConfig
from llm_book.gpu import train_flops_per_token
from llm_book.lab import recall
from llm_book.train import TrainConfig, update

sys.path.append(str(ROOT / "benchmarks"))

import speed_ladder as ladder
from speed_ladder import (
    RUNGS,
    SIZES,
    START,
    first_model,
    ladder_key,
    ladder_table,
    main,
    prepare,
    record_ladder,
    speed_ladder,
    switches,
    unavailable,
)

CPU = torch.device("cpu")
TOKENS = np.random.default_rng(0).integers(0, 50, 4_000)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small lose more by waiting for a second one than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**changes):
    return GPTConfig(**{**dict(vocab_size=50, max_len=16, n_layers=2, d_model=16, n_heads=4), **changes})


def plan(**changes):
    return TrainConfig(**{**dict(max_steps=6, batch_size=2, accumulation_steps=2, seq_len=16,
                                 warmup_steps=1, eval_windows=8), **changes})


# ---- the ladder

HERE = [rung for rung in RUNGS if rung[0] != "compile"]


@pytest.fixture(scope="module")
def rows():
    wrong = ("bfloat16 weights", {"weights": torch.bfloat16})
    return list(speed_ladder(config(d_model=32), TOKENS % 7, TOKENS % 7, plan(max_steps=30, max_lr=3e-3),
                             device="cpu", rungs=[*HERE, wrong], peak_flops=1e9))


def test_every_rung_ends_at_the_same_loss(rows):
    by_name = {row["rung"]: row for row in rows}
    assert list(by_name) == [name for name, _ in HERE] + ["bfloat16 weights"]
    assert by_name["TF32"] == {"rung": "TF32", "skipped": "needs an NVIDIA GPU"}
    for name, row in by_name.items():
        if name not in ("TF32", "bfloat16 weights"):
            assert row["same"] and abs(row["difference"]) <= 3 * row["noise"], row
    assert by_name["float32"]["difference"] == 0
    assert not by_name["bfloat16 weights"]["same"]


def test_rows_have_speed_and_memory(rows):
    for row in rows:
        if "skipped" not in row:
            assert len(row["seconds"]) == 29 and len(row["rates"]) == 5
            timed = row["seconds"][2:]
            assert 64 / max(timed) <= row["tokens_per_second"] <= 64 / min(timed)
            expected = row["tokens_per_second"] * train_flops_per_token(config(d_model=32), 16) / 1e9
            assert math.isclose(row["mfu"], expected)
            assert row["peak_bytes"] > 8 * 26_000  # bfloat16 weights have half of everything
    by_name = {row["rung"]: row for row in rows}
    assert by_name["checkpointing"]["peak_bytes"] < by_name["larger batch"]["peak_bytes"]


def test_table_says_what_is_not_the_same(rows):
    table = ladder_table(rows)
    assert table.count("NOT THE SAME") == 1 and "needs an NVIDIA GPU" in table
    assert table.splitlines()[-1].startswith("noise of the loss 0.0")


@pytest.mark.parametrize("damage", ["lr", "order", "batch"])
def test_a_rung_that_changes_the_updates_is_caught(monkeypatch, damage):
    """What a faster loop may get wrong must not pass."""
    honest = ladder.prepare

    def damaged(model, plan, settings):
        if settings.get("damage") == "lr":
            plan = TrainConfig(**{**plan.__dict__, "max_lr": plan.max_lr * 0.9})
        if settings.get("damage") == "order":
            plan = TrainConfig(**{**plan.__dict__, "seed": 5})
        if settings.get("damage") == "batch":
            plan = TrainConfig(**{**plan.__dict__, "accumulation_steps": 1})
        return honest(model, plan, settings)

    monkeypatch.setattr(ladder, "prepare", damaged)
    found = list(speed_ladder(
        config(), TOKENS % 7, TOKENS % 7, plan(max_steps=12), device="cpu", twins=2,
        rungs=[("float32", {}), ("damaged", {"damage": damage})], peak_flops=1.0))
    assert found[0]["same"] and not found[1]["same"]


def test_switches_are_put_back():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), switches({**START, "tf32": True}):
        assert torch.get_float32_matmul_precision() == "high"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
    q = torch.randn(1, 1, 4, 4)
    for fused in (False, True):
        with switches({**START, "fused_attention": fused}):
            assert torch.backends.cuda.flash_sdp_enabled() == fused
            nn.functional.scaled_dot_product_attention(q, q, q)


def test_fused_optimizer_makes_the_same_steps():
    found = []
    for fused in (False, True):
        model = first_model(config(), plan(), CPU, torch.float32, 0)
        run = prepare(model, plan(), {**START, "fused_optimizer": fused})
        while run.step < plan().max_steps:
            update(run, run.draw(run, TOKENS))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_twins_are_off_by_a_rounding():
    first, twin, other = (first_model(config(), plan(), CPU, torch.float32, i) for i in (0, 1, 2))
    for a, b, c in zip(first.parameters(), twin.parameters(), other.parameters()):
        assert torch.allclose(b, a, rtol=2**-8 + 1e-6, atol=0)
        assert a.eq(0).all() or not (a.equal(b) or b.equal(c))


def test_out_of_memory_is_a_row(monkeypatch):
    def climb(config, train, val, plan, device, settings, twin=0):
        if settings["whole_batch"] and not settings["checkpointing"]:
            raise torch.OutOfMemoryError
        return {"seconds": [1.0] * 5, "peak_bytes": None, "loss": 1.0 + 0.1 * twin}

    monkeypatch.setattr(ladder, "climb", climb)
    found = list(speed_ladder(config(), TOKENS, TOKENS, plan(), device="cpu", rungs=HERE, peak_flops=1.0))
    assert found[-2] == {"rung": "larger batch", "skipped": "out of memory"}
    assert found[-1]["same"] and "skipped" not in found[-1]
    ladder_table(found)


@pytest.mark.parametrize("bad_plan, twins, message", [
    (plan(max_steps=3), 4, "max_steps must be at least 4"), (plan(), 1, "twins must be at least 2"),
    (plan(optimizer="muon"), 4, "optimizer must be 'adamw'")])
def test_ladder_refuses(bad_plan, twins, message):
    with pytest.raises(ValueError, match=message):
        list(speed_ladder(config(), TOKENS, TOKENS, bad_plan, device="cpu", twins=twins))


def test_what_a_device_cannot_do(monkeypatch):
    cuda = torch.device("cuda")
    assert unavailable({}, CPU) is None and unavailable({"precision": "bfloat16"}, CPU) is None
    monkeypatch.setattr(ladder.shutil, "which", lambda name: None)
    assert unavailable({"compiled": True}, CPU) == "needs a C++ compiler (g++ or clang++)"
    monkeypatch.setattr(ladder.shutil, "which", lambda name: "/bin/g++" if name == "g++" else None)
    assert unavailable({"compiled": True}, CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(ladder, "has_triton", lambda: False)
    assert "Ampere" in unavailable({"tf32": True}, cuda)
    assert unavailable({"precision": "bfloat16"}, cuda) == "needs a GPU with bfloat16"
    assert unavailable({"compiled": True}, cuda) == "needs the package triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert unavailable({"tf32": True}, cuda) is None


# ---- the ledger and the command line

def test_recorded_rows_come_back(rows, ledger):
    record_ladder(rows, "cpu", "tiny", "python benchmarks/gpu.py", steps=30)
    entry = recall(ladder_key("fused optimizer", "cpu", "tiny"))
    row = next(row for row in rows if row["rung"] == "fused optimizer")
    assert entry["values"] == row["rates"] and entry["context"]["mfu"] == row["mfu"]
    assert entry["context"]["steps"] == 30
    assert len(recall("gpu")) == len(rows) - 1  # all but TF32


def test_main_runs_and_records(ledger, capsys, monkeypatch):
    monkeypatch.setattr(ladder, "matmul_peak", lambda device, dtype: 1e11)
    found = main(["--device", "cpu", "--preset", "tiny", "--steps", "5", "--twins", "2", "--record",
                  "--threads", "1", "--batch-size", "1", "--accumulation", "2", "--skip", "compile", "larger batch"])
    names = [row["rung"] for row in found]
    assert names == [name for name, _ in RUNGS if name not in ("compile", "larger batch")]
    assert "tokens/s" in capsys.readouterr().out
    assert recall("gpu/cpu_tiny.float32")["command"] == (
        "python benchmarks/speed_ladder.py --device cpu --preset tiny")


@pytest.mark.parametrize("argv, message", [
    (["--device", "cpu", "--skip", "comple"], "no such rung: comple"),
    (["--skip", "float32"], "no such rung: float32"),
    (["--preset", "huge"], "invalid choice: 'huge'"),
    pytest.param(["--device", "cuda"], "there is no cuda device here", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is one"))])
def test_main_refuses(argv, message, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert message in capsys.readouterr().err


def test_help_names_every_option_and_rung():
    shown = subprocess.run([sys.executable, "benchmarks/speed_ladder.py", "--help"], cwd=ROOT, text=True,
                           check=True, capture_output=True,
                           env={**os.environ, "COLUMNS": "1000"}).stdout
    for word in ("--device", "--steps", "--preset", "--record", "--twins", "--skip", "--batch-size",
                 *SIZES, *(name for name, _ in RUNGS[1:])):
        assert word in shown, word


def test_sizes_are_those_that_have_names():
    gpt2 = SIZES["gpt2"][0]
    with torch.device("meta"):
        n = sum(p.numel() for p in GPT(gpt2).parameters())
    assert n == 124_439_808 + 47 * 768 and gpt2.max_len == 1_024
    shape = SIZES["shakespeare"][0]
    assert (shape.n_layers, shape.d_model, shape.max_len) == (6, 384, 256)
