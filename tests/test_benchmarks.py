"""What the benchmarks share: calls that take turns, records that name their machine."""
import json
import os
import sys
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT

with mock.patch.dict(os.environ), mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
    import common  # which sets the number of threads for what is loaded after it


class Clock:
    """Time passes only in calls."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def work(self, name, costs):
        costs = iter(costs)

        def call():
            self.calls.append(name)
            self.now += next(costs)

        return call


def test_calls_take_turns_in_an_order_that_is_reversed():
    clock = Clock()
    calls = {"a": clock.work("a", [9, 1, 3, 1, 3]), "b": clock.work("b", [9, 2, 2, 8, 8])}
    times = common.in_turns(calls, range(2), repeat=2, warm_up=1, clock=clock)
    assert "".join(clock.calls) == "ab" + "aabb" + "bbaa"
    assert times["a"].tolist() == [2, 2] and times["b"].tolist() == [2, 8]


@pytest.mark.parametrize("best, expected", [(min, 1), (np.median, 2)])
def test_of_the_rounds_of_a_run_one_number_is_kept(best, expected):
    clock = Clock()
    times = common.in_turns({"a": clock.work("a", [0, 5, 1, 2])}, [7], rounds=3, best=best, clock=clock)
    assert times["a"].tolist() == [expected] and clock.calls == 4 * ["a"]


def test_a_report_is_a_record_and_a_line(ledger, capsys):
    bench = common.Bench("speed", runs=range(3), cores=1)
    bench.report("ratio", np.array([1.0, 2.0, 6.0]), "ratio of times", peer="x")
    bench.report("size", 7, "MB")
    bench.report("loss", [1.0, 2.0], "nats", seeds=(4, 5))
    found = json.loads((ledger / "speed.json").read_text())
    assert found["ratio"]["value"] == 3 and found["ratio"]["seeds"] == [0, 1, 2]
    assert found["ratio"]["context"] == {"cores": 1, "peer": "x"}
    assert {entry["command"] for entry in found.values()} == {"python benchmarks/speed.py"}
    assert found["size"]["seeds"] == [] and found["loss"]["seeds"] == [4, 5]
    machine, *lines = capsys.readouterr().out.splitlines()
    assert machine.startswith("# ") and "torch" in machine
    assert lines == ["ratio: 3 ± 2.6, median 2 ratio of times", "size: 7 MB",
                     "loss: 1.5 ± 0.71, median 1.5 nats"]
