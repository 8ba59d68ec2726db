"""benchmarks/on_gpu.py, on a CPU: every branch in tiny sizes, the clock, parts that fail."""
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from unittest import mock

import pytest
import torch
from conftest import ROOT

with mock.patch.dict(os.environ), mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
    import on_gpu

LEDGER = ROOT / "llm_book" / "results"


@pytest.fixture
def bench(ledger, tmp_path):
    """A tiny one whose parts a test may replace."""
    options = Namespace(seconds=1e6, out=tmp_path / "out", data=None, only=on_gpu.SECTIONS, commit="abc",
                        tiny=True)
    return on_gpu.OnGPU(options)


def ends(bench):
    found = json.loads((bench.out / "summary.json").read_text())
    return [(part["part"], part["end"].partition(":")[0]) for part in found]


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys, ledger):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["on_gpu.py"])
    assert on_gpu.main() == 0
    assert "there is no GPU here" in capsys.readouterr().out and not list(ledger.iterdir())


def test_a_part_that_fails_stops_no_other(bench, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(bench, "parts", lambda: [
        ("checks", 1, lambda: done.append(1)), ("race", 1, lambda: 1 / 0), ("rung", 1, lambda: done.append(2))])
    assert not bench.all() and done == [1, 2]
    assert ends(bench) == [("checks", "done"), ("race", "failed"), ("rung", "done")]
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_no_part_is_begun_that_the_time_does_not_allow(bench, monkeypatch):
    bench.tiny, bench.stop, done = False, time.monotonic() + 100, []
    monkeypatch.setattr(bench, "parts", lambda: [
        ("race", 200, lambda: done.append(1)), ("rung", 10, lambda: done.append(2))])
    assert bench.all() and done == [2]
    assert ends(bench) == [("race", "not begun"), ("rung", "done")]


def test_a_part_that_hangs_is_stopped(bench, monkeypatch):
    def hangs():
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                pass

    bench.stop = time.monotonic() + 0.5
    monkeypatch.setattr(bench, "parts", lambda: [("race", 0, hangs), ("rung", 0, lambda: None)])
    assert not bench.all()
    assert ends(bench) == [("race", "failed"), ("rung", "not begun")]


def test_only_what_is_asked_for_and_the_important_first(bench):
    names = [name for name, *_ in bench.parts()]
    assert list(dict.fromkeys(names)) == ["checks", "tests", "ceilings", "race", "ladder", "rung", "memory"]
    bench.options.data = "plays.txt"
    names = [name for name, *_ in bench.parts()]
    assert list(dict.fromkeys(names)) == list(on_gpu.SECTIONS)


def test_a_failed_check_is_recorded_and_said(bench, monkeypatch, ledger):
    for name in ("same_training", "same_text", "same_after_resume"):
        monkeypatch.setattr(on_gpu, name, lambda device: "fine")
        getattr(on_gpu, name).__name__ = name
    monkeypatch.setattr(on_gpu, "no_waiting", mock.Mock(side_effect=AssertionError("waits"), __name__="no_waiting"))
    with pytest.raises(AssertionError, match="failed: no_waiting"):
        bench.checks()
    entry = json.loads((ledger / "gpu.json").read_text())["tiny_checks"]
    assert entry["value"] == 3 and entry["context"]["failed"] == {"no_waiting": "waits"}


def test_what_a_bare_checkout_lacks_is_named(bench, monkeypatch, ledger):
    bench.record("x", 1.0, "unit")
    path = ledger / "gpu.json"
    records = json.loads(path.read_text())
    records["tiny_x"]["commit"] = None
    path.write_text(json.dumps(records))
    bench.keep()
    assert json.loads((bench.out / "gpu.json").read_text())["tiny_x"]["commit"] == "abc"
    monkeypatch.setattr(on_gpu.importlib.metadata, "version", mock.Mock(
        side_effect=on_gpu.importlib.metadata.PackageNotFoundError))
    monkeypatch.setattr(sys, "path", [])
    on_gpu.name_the_version()
    (found,) = on_gpu.importlib.metadata.distributions(name="llm_book", path=sys.path)
    assert found.version == on_gpu.llm_book.__version__


@pytest.mark.slow
def test_every_branch_runs_in_tiny_sizes(tmp_path):
    before = {path: path.read_bytes() for path in LEDGER.glob("*.json")}
    plays = tmp_path / "plays.txt"
    plays.write_text("To be, or not to be: that is the question.\n" * 300)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "on_gpu.py", "--tiny", "--out", tmp_path / "out",
                           "--data", plays, "--seconds", "1000"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {part["part"] for part in summary} == set(on_gpu.SECTIONS)
    assert {part["end"] for part in summary} == {"done"}
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    for key in ("checks", "peak_float32", "bandwidth", "mfu", "vs_transformers", "vs_plain", "small.float32",
                "small.checkpointing", "shakespeare_loss", "shakespeare_time", "memory_ratio"):
        assert f"tiny_{key}" in found
    assert all(key.startswith("tiny_") for key in found)
    assert list(json.loads((tmp_path / "out" / "ladder.json").read_text())) == ["tiny_gpt"]
    assert before == {path: path.read_bytes() for path in LEDGER.glob("*.json")}
    assert "tiny_checks: 4" in (tmp_path / "out" / "log.txt").read_text()
