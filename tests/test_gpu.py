"""Chapter 16: counts against torch's own counters, the ladder's proof, the command line."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm_book import gpu
from llm_book.gpt import GPT, GPTConfig
from llm_book.gpu import (
    RUNGS,
    SIZES,
    START,
    checkpoint_blocks,
    ladder_key,
    ladder_table,
    main,
    matmul_peak,
    memory_bandwidth,
    memory_estimate,
    mfu,
    peak_bytes,
    record_ladder,
    roofline,
    saved_for_backward,
    seconds_per_call,
    speed_ladder,
    synchronise,
    train_flops_per_token,
    unavailable,
)
from llm_book.lab import recall
from llm_book.train import TrainConfig, accumulate

CPU = torch.device("cpu")
TOKENS = np.random.default_rng(0).integers(0, 50, 4_000)
LLAMA = dict(positions="rotary", norm="rms", feed_forward="swiglu", bias="none", n_kv_heads=2)


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


# ---- the roofline and the clock

@given(intensity=st.floats(1e-3, 1e6), peak=st.floats(1, 1e15), bandwidth=st.floats(1, 1e13))
def test_roofline_is_the_lower_of_two_limits(intensity, peak, bandwidth):
    rate = roofline(intensity, peak, bandwidth)
    flops = 1e9
    assert math.isclose(flops / rate, max(flops / peak, flops / intensity / bandwidth), rel_tol=1e-9)


def test_roofline_takes_arrays():
    assert roofline([1, 10, 100], 50.0, 2.0).tolist() == [2, 20, 50]


def test_seconds_per_call_leaves_the_warm_up_out(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: clock[0])

    def work():
        calls.append(1)
        clock[0] += 100.0 if len(calls) <= 2 else 0.5

    assert seconds_per_call(work, CPU, repeats=3, warm_up=2) == [0.5] * 3
    assert len(calls) == 5
    for bad in (dict(repeats=0), dict(warm_up=-1)):
        with pytest.raises(ValueError, match="repeats must be at least 1"):
            seconds_per_call(work, CPU, **bad)
    assert len(calls) == 5


def test_the_clock_waits_for_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("cuda"))
    seconds_per_call(lambda: waited.append("work"), torch.device("cuda"), repeats=2, warm_up=0)
    assert waited == ["cuda", "work", "cuda"] * 2
    synchronise(CPU)
    assert len(waited) == 6


def test_ceilings_count_what_was_done(monkeypatch):
    monkeypatch.setattr(gpu, "seconds_per_call", lambda fn, device, repeats=5: [2.0, (fn(), 0.5)[1]])
    assert matmul_peak(CPU, torch.bfloat16, 8) == 2 * 8**3 / 0.5
    assert memory_bandwidth(CPU, 4_000) == 2 * 4_000 / 0.5


# ---- FLOPs

@settings(max_examples=10)
@given(layers=st.integers(1, 3), heads=st.sampled_from([(2, 2), (4, 2), (4, 1)]), K=st.sampled_from([4, 8]),
       T=st.integers(1, 16), V=st.integers(2, 60), swiglu=st.booleans(), tied=st.booleans())
def test_flops_are_those_that_torch_counts(layers, heads, K, T, V, swiglu, tied):
    c = GPTConfig(V, max_len=16, n_layers=layers, d_model=24, n_heads=heads[0], n_kv_heads=heads[1],
                  head_dim=K, tied=tied, feed_forward="swiglu" if swiglu else "gelu", bias="none")
    model, ids = GPT(c), torch.zeros(2, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids)[1].backward()
    assert counter.get_total_flops() == 2 * T * train_flops_per_token(c, T)


def test_causal_counts_the_triangle():
    c = config()
    square, triangle = (train_flops_per_token(c, 16, causal) for causal in (False, True))
    pairs = sum(range(1, 17))
    assert math.isclose(square - triangle, 12 * 2 * 16 * (16 - pairs / 16))


@pytest.mark.parametrize("seq_len", [0, 17])
def test_flops_refuse_a_length(seq_len):
    with pytest.raises(ValueError, match=f"seq_len must be from 1 to max_len = 16, not {seq_len}"):
        train_flops_per_token(config(), seq_len)


def test_mfu():
    assert mfu(200.0, 3.0, 1_000.0) == 0.6
    for name, values in (("tokens_per_second", (0, 1, 1)), ("flops_per_token", (1, -1, 1)),
                         ("peak_flops", (1, 1, math.nan))):
        with pytest.raises(ValueError, match=f"{name} must be above 0"):
            mfu(*values)


# ---- memory

CASES = [dict(precision=precision, fused_attention=fused)
         for precision in ("float32", "bfloat16") for fused in (True, False)]


def one_pass(c, B, T, precision="float32", fused_attention=True, checkpointing=False):
    """Bytes kept for backward, and at the peak, of a pass whose gradients join older ones."""
    torch.manual_seed(0)
    model, ids = GPT(c), torch.randint(c.vocab_size, (B, T))
    model = checkpoint_blocks(model) if checkpointing else model
    accumulate(model, [(ids, ids)], precision)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if fused_attention else SDPBackend.MATH):
        with saved_for_backward(model) as kept, torch.autocast("cpu", enabled=precision == "bfloat16"):
            model(ids, ids)
        state = 2 * sum(p.nbytes for p in model.parameters())
        peak = peak_bytes(lambda: accumulate(model, [(ids, ids)], precision), CPU, state)
    return sum(kept.values()), peak


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("c, B, T", [
    (config(vocab_size=300, d_model=64, max_len=64), 4, 64),
    (config(vocab_size=90, d_model=32, n_heads=2, d_ff=96, n_layers=3, max_len=48), 3, 37),
])
def test_memory_is_what_is_kept(c, B, T, case):
    kept, peak = one_pass(c, B, T, **case)
    guess = memory_estimate(c, B, T, **case)
    expected = guess["converted weights"] + guess["activations"] + guess["logits"] // 3
    assert abs(kept - expected) <= 16 * B * T + 64  # the ids and the targets
    assert abs(peak / (sum(guess.values()) - guess["optimizer"]) - 1) < 0.05


@pytest.mark.parametrize("V", [50, 2_000])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_memory_of_checkpointing(V, precision):
    c = config(vocab_size=V, d_model=64, n_layers=4, max_len=64)
    kept, peak = one_pass(c, 4, 64, precision, checkpointing=True)
    guess = memory_estimate(c, 4, 64, precision=precision, checkpointing=True)
    assert abs(peak / (sum(guess.values()) - guess["optimizer"]) - 1) < 0.08
    assert kept < one_pass(c, 4, 64, precision)[0] / 2 or V == 2_000


def test_memory_counts_the_state():
    c = config()
    n = sum(p.numel() for p in GPT(c).parameters())
    guess = memory_estimate(c, 1, 16)
    assert [guess[part] for part in ("parameters", "gradients", "optimizer")] == [4 * n, 4 * n, 8 * n]
    empty = memory_estimate(c, 0, 16)
    assert sum(empty.values()) == 16 * n


@pytest.mark.parametrize("changes, name", [
    (dict(positions="rotary"), "positions"), (dict(norm="rms"), "norm"), (dict(dropout=0.1), "dropout"),
    (dict(n_kv_heads=2), "n_kv_heads"), (dict(qk_norm=True), "qk_norm"),
    (dict(feed_forward="swiglu", bias="none"), "feed_forward")])
def test_memory_refuses_parts_it_does_not_count(changes, name):
    with pytest.raises(ValueError, match=f"{name} must be .* for an estimate"):
        memory_estimate(config(**changes), 1, 16)


def test_memory_refuses_a_precision():
    with pytest.raises(ValueError, match="precision must be 'float32' or 'bfloat16', not 'float16'"):
        memory_estimate(config(), 1, 16, precision="float16")


def test_peak_bytes_sees_what_comes_and_goes():
    def work():
        a = torch.zeros(250_000)
        del a
        b = torch.zeros(100_000)
        return b

    assert abs(peak_bytes(work, CPU, 7) - 1_000_007) < 1_000
    assert peak_bytes(lambda: None, CPU, 7) == 7


def test_saved_for_backward_leaves_parameters_out():
    layer, x = nn.Linear(8, 8), torch.randn(16, 8, requires_grad=True)
    with saved_for_backward(layer) as found:
        layer(x).tanh()
    assert sum(found.values()) == 2 * 16 * 8 * 4  # x, and the result of tanh
    with saved_for_backward(layer) as found, torch.no_grad():
        layer(x)
    assert not found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [dict(dropout=0.3), LLAMA], ids=str)
def test_checkpointing_gives_the_same_bits(parts, precision):
    ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for change in (lambda model: model, checkpoint_blocks):
        torch.manual_seed(0)
        model = change(GPT(config(**parts)))
        names = [name for name, _ in model.named_parameters()]
        torch.manual_seed(1)
        accumulate(model, [(ids, ids)], precision)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert list(gradients[0]) == list(gradients[1]) == names
    assert all(gradients[0][name].equal(gradients[1][name]) for name in names)


# ---- the ladder

HERE = [rung for rung in RUNGS if rung[0] != "compile"]


@pytest.fixture(scope="module")
def rows():
    wrong = ("bfloat16 weights", {"weights": torch.bfloat16})
    return speed_ladder(config(d_model=32), TOKENS % 7, TOKENS % 7, plan(max_steps=30, max_lr=3e-3),
                        device="cpu", rungs=[*HERE, wrong], peak_flops=1e9)


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
    honest = gpu._updates

    def damaged(model, tokens, plan, settings):
        if settings.get("damage") == "lr":
            plan = TrainConfig(**{**plan.__dict__, "max_lr": plan.max_lr * 0.9})
        if settings.get("damage") == "order":
            plan = TrainConfig(**{**plan.__dict__, "seed": 5})
        if settings.get("damage") == "batch":
            plan = TrainConfig(**{**plan.__dict__, "accumulation_steps": 1})
        return honest(model, tokens, plan, settings)

    monkeypatch.setattr(gpu, "_updates", damaged)
    found = speed_ladder(config(), TOKENS % 7, TOKENS % 7, plan(max_steps=12), device="cpu", twins=2,
                         rungs=[("float32", {}), ("damaged", {"damage": damage})], peak_flops=1.0)
    assert found[0]["same"] and not found[1]["same"]


def test_switches_are_put_back():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), gpu._switches({**START, "tf32": True}):
        assert torch.get_float32_matmul_precision() == "high"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
    q = torch.randn(1, 1, 4, 4)
    for fused in (False, True):
        with gpu._switches({**START, "fused_attention": fused}):
            assert torch.backends.cuda.flash_sdp_enabled() == fused
            nn.functional.scaled_dot_product_attention(q, q, q)


def test_fused_optimizer_makes_the_same_steps():
    found = []
    for fused in (False, True):
        model = gpu._model(config(), plan(), CPU, torch.float32, 0)
        for update in gpu._updates(model, TOKENS, plan(), {**START, "fused_optimizer": fused}):
            update()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_twins_are_off_by_a_rounding():
    first, twin, other = (gpu._model(config(), plan(), CPU, torch.float32, i) for i in (0, 1, 2))
    for a, b, c in zip(first.parameters(), twin.parameters(), other.parameters()):
        assert torch.allclose(b, a, rtol=2**-8 + 1e-6, atol=0)
        assert a.eq(0).all() or not (a.equal(b) or b.equal(c))


def test_out_of_memory_is_a_row(monkeypatch):
    def climb(config, train, val, plan, device, settings, twin=0):
        if settings["whole_batch"] and not settings["checkpointing"]:
            raise torch.OutOfMemoryError
        return {"seconds": [1.0] * 5, "peak_bytes": None, "loss": 1.0 + 0.1 * twin}

    monkeypatch.setattr(gpu, "_climb", climb)
    found = speed_ladder(config(), TOKENS, TOKENS, plan(), device="cpu", rungs=HERE, peak_flops=1.0)
    assert found[-2] == {"rung": "larger batch", "skipped": "out of memory"}
    assert found[-1]["same"] and "skipped" not in found[-1]
    ladder_table(found)


@pytest.mark.parametrize("bad_plan, twins", [(plan(max_steps=3), 4), (plan(), 1), (plan(optimizer="muon"), 4)])
def test_ladder_refuses(bad_plan, twins):
    with pytest.raises(ValueError, match="plan must have at least 4 steps of 'adamw'"):
        speed_ladder(config(), TOKENS, TOKENS, bad_plan, device="cpu", twins=twins)


def test_what_a_device_cannot_do(monkeypatch):
    cuda = torch.device("cuda")
    assert unavailable({}, CPU) is None and unavailable({"precision": "bfloat16"}, CPU) is None
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert unavailable({"compiled": True}, CPU) == "needs a C++ compiler (g++ or clang++)"
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/bin/g++" if name == "g++" else None)
    assert unavailable({"compiled": True}, CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(gpu, "has_triton", lambda: False)
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


def test_main_runs_and_records(ledger, capsys):
    found = main(["--device", "cpu", "--preset", "tiny", "--steps", "5", "--twins", "2", "--record",
                  "--threads", "1", "--batch-size", "1", "--accumulation", "2", "--skip", "compile", "larger batch"])
    names = [row["rung"] for row in found]
    assert names == [name for name, _ in RUNGS if name not in ("compile", "larger batch")]
    assert "tokens/s" in capsys.readouterr().out
    assert recall("gpu/cpu_tiny.float32")["command"] == "python -m llm_book.gpu --device cpu --preset tiny"


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
    shown = subprocess.run([sys.executable, "-m", "llm_book.gpu", "--help"], cwd=ROOT, text=True,
                           check=True, capture_output=True, env={**os.environ, "COLUMNS": "1000"}).stdout
    for word in ("--device", "--steps", "--preset", "--record", "--twins", "--skip", "--batch-size",
                 *SIZES, *(name for name, _ in RUNGS[1:])):
        assert word in shown, word
    assert "show this help" in shown and json.dumps(shown)


def test_sizes_are_those_that_have_names():
    gpt2 = SIZES["gpt2"][0]
    with torch.device("meta"):
        n = sum(p.numel() for p in GPT(gpt2).parameters())
    assert n == 124_439_808 + 47 * 768 and gpt2.max_len == 1_024
    shape = SIZES["shakespeare"][0]
    assert (shape.n_layers, shape.d_model, shape.max_len) == (6, 384, 256)
