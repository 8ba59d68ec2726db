"""Chapter 16: counts against torch's own counters, attention in tiles, the report."""
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm_book import gpu
from llm_book.attention import causal_mask, scaled_dot_product_attention
from llm_book.gpt import GPT, GPTConfig
from llm_book.gpu import (
    checkpoint_blocks,
    flash_attention,
    main,
    matmul_peak,
    memory_bandwidth,
    memory_estimate,
    mfu,
    peak_bytes,
    report,
    roofline,
    saved_for_backward,
    seconds_per_call,
    synchronise,
    train_flops_per_token,
)
from llm_book.train import accumulate

CPU = torch.device("cpu")
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
        with pytest.raises(ValueError, match="repeats and warm_up must be at least 1 and 0"):
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
    monkeypatch.setattr(gpu, "seconds_per_call",
                        lambda fn, device, repeats=5, warm_up=2: [2.0, (fn(), 0.5)[1]])
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


# ---- attention in tiles

def tensors(T, S, K, N=None, dtype=torch.float32, leading=(2, 3), scale=1.0):
    """Queries, keys and values."""
    numbers = torch.Generator().manual_seed(T * 100 + S)
    return [scale * torch.randn(*leading, length, width, generator=numbers, dtype=dtype)
            for length, width in ((T, K), (S, K), (S, N or K))]


@given(T=st.integers(1, 40), more=st.integers(0, 30), block=st.integers(1, 80), causal=st.booleans())
def test_flash_attention_is_attention(T, more, block, causal):
    q, k, v = tensors(T, T + more, 4, 5)
    mask = causal_mask(T, T + more) if causal else None
    found = flash_attention(q, k, v, causal, block)
    torch.testing.assert_close(found, nn.functional.scaled_dot_product_attention(q, k, v, mask))
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [3, 7, 64])
def test_flash_attention_has_the_gradient_of_attention(causal, block):
    gradients = []
    for attend in (lambda q, k, v: flash_attention(q, k, v, causal, block),
                   lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)):
        leaves = [x.requires_grad_() for x in tensors(13, 13, 4, dtype=torch.float64)]
        attend(*leaves).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)
    assert gradients[0][0].dtype == torch.float64


def test_flash_attention_passes_a_finite_difference():
    leaves = [x.requires_grad_() for x in tensors(5, 6, 3, 2, dtype=torch.float64, leading=(1,))]
    for causal in (False, True):
        assert torch.autograd.gradcheck(partial(flash_attention, causal=causal, block=2), leaves)


def test_flash_attention_survives_large_scores_and_other_types():
    q, k, v = tensors(9, 9, 4, scale=200.0)
    found = flash_attention(q, k, v, True, 4)
    assert found.isfinite().all()
    torch.testing.assert_close(found, nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    low = flash_attention(*tensors(9, 9, 4, dtype=torch.bfloat16), block=4)
    assert low.dtype == torch.bfloat16
    meta = flash_attention(*(x.to("meta") for x in tensors(9, 9, 4)), causal=False, block=4)
    assert meta.device.type == "meta" and meta.shape == (2, 3, 9, 4)


def test_flash_attention_refuses_a_query_before_the_first_key():
    q, k, v = tensors(5, 3, 4)
    with pytest.raises(ValueError, match="causal must be False with more queries than keys"):
        flash_attention(q, k, v, causal=True)
    assert flash_attention(q, k, v).shape == (2, 3, 5, 4)


def test_tiles_take_little_memory():
    q, k, v = tensors(1_024, 1_024, 16, leading=(1, 2))
    plain, tiled = (peak_bytes(partial(attend, q, k, v), CPU)
                    for attend in (scaled_dot_product_attention, flash_attention))
    assert plain > 2 * 4 * 1_024**2 and tiled < plain / 10


# ---- the report and the command line

@pytest.fixture
def known_machine(monkeypatch):
    """One that does 1 TFLOP/s in float32, 4 in bfloat16, and moves 100 GB/s."""
    monkeypatch.setattr(gpu, "matmul_peak", lambda device, dtype: 1e12 if dtype == torch.float32 else 4e12)
    monkeypatch.setattr(gpu, "memory_bandwidth", lambda device: 1e11)


def test_report_says_what_training_needs_and_reaches(known_machine):
    text, gpt2 = report(CPU, "gpt2-medium", 4, 0.5), GPTConfig.preset("gpt2-medium")
    needs = sum(memory_estimate(gpt2, 4, 1_024, precision="bfloat16").values())
    for part in ("1,000.0 GFLOP/s at most, ridge point 10.0", "4,000.0 GFLOP/s at most, ridge point 40.0",
                 "100.0 GB/s", "gpt2-medium", f"needs {needs / 1e9:.1f} GB", "trained in bfloat16 with 4 windows",
                 f"{2e12 / train_flops_per_token(gpt2, 1_024):,.0f} tokens per second at an MFU of 50%"):
        assert part in text, part


def test_report_takes_the_faster_format(monkeypatch):
    monkeypatch.setattr(gpu, "matmul_peak", lambda device, dtype: 4e12 if dtype == torch.float32 else 1e12)
    monkeypatch.setattr(gpu, "memory_bandwidth", lambda device: 1e11)
    assert "trained in float32" in report(CPU)


def test_main_prints_the_report(known_machine, capsys):
    main(["--device", "cpu", "--batch-size", "2", "--threads", "1", "--mfu", "0.3"])
    shown = capsys.readouterr().out
    assert "cpu, 1 CPU threads" in shown and "2 windows of 1,024" in shown and "MFU of 30%" in shown


@pytest.mark.parametrize("argv, message", [
    (["--preset", "llama-style"], "invalid choice: 'llama-style'"), (["--batch-size", "0"], "at least 1"),
    (["--device", "cpu", "--mfu", "1.5"], "--mfu from 0 to 1"), (["--mfu", "nan"], "--mfu from 0 to 1"),
    pytest.param(["--device", "cuda"], "there is no cuda device here", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is one"))])
def test_main_refuses(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
