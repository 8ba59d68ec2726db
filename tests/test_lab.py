"""Chapter 00: seeds, style, ledger, exercises."""
import importlib.metadata
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from llm_book import lab


def test_seed_sets_all_three_generators():
    import random

    def draw():
        lab.seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match="seed must be"):
        lab.seed_everything(seed)


def test_record_and_recall(ledger):
    entry = lab.record("a/b", [1, 2, 6], "s", seeds=[0, 1, 2], command="c", corpus="x")
    assert entry == lab.recall("a/b")
    assert entry["value"] == 3 and entry["sd"] == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert entry["context"] == {"corpus": "x"}  # torch.__version__ may add how it was built: +cu130
    assert entry["versions"]["torch"] == importlib.metadata.version("torch")
    assert entry["hardware"]["cores"] >= 1 and entry["date"].endswith("+00:00")
    lab.record("a/c", 1.0, "s", seeds=(), command="c")
    assert set(lab.recall("a")) == {"b", "c"} and lab.recall("a/c")["sd"] is None


@pytest.mark.parametrize("name, value, seeds, message", [
    ("nofile", 1, (), "name must"), ("A/b", 1, (), "name must"), ("../a/b", 1, (), "name must"),
    ("a/b", float("inf"), (), "finite"), ("a/b", [], (), "finite"), ("a/b", [1, 2], (), "seeds"), ("a/b", [1, 2], [0], "seeds"),
    ("a/b", 1.0, [0, 1, 2], "seeds"),
])
def test_record_refuses_before_writing(ledger, name, value, seeds, message):
    with pytest.raises(ValueError, match=message):
        lab.record(name, value, "s", seeds=seeds, command="c")
    assert list(ledger.iterdir()) == []


def test_record_keeps_the_old_ledger_if_writing_fails(ledger):
    lab.record("a/b", 1, "s", seeds=(), command="c")
    with pytest.raises(TypeError):
        lab.record("a/c", 1, "s", seeds=(), command="c", strange=object())
    assert list(json.loads((ledger / "a.json").read_text())) == ["b"]
    assert len(list(ledger.iterdir())) == 1


def test_recall_names_what_there_is(ledger):
    lab.record("a/b", 1, "s", seeds=(), command="c")
    with pytest.raises(KeyError, match=r"there are \['b'\]"):
        lab.recall("a/z")
    with pytest.raises(KeyError, match=r"there are \['a'\]"):
        lab.recall("z/b")


def test_ladder_is_sorted_lit_and_shows_nothing_early(ledger):
    for rung, value in (("unigram", 2.0), ("uniform", 8.0), ("mlp", 1.0)):
        lab.record(f"ladder/{rung}", value, "bits per byte", seeds=(), command="c", label=rung)
    red = lab.COLOURS["red"].lower()
    for chapter, names, lit in (("03", ["uniform", "unigram"], [0, 1]),
                                ("09", ["uniform", "unigram", "mlp"], [2]),
                                (None, ["uniform", "unigram", "mlp"], [2])):
        ax = lab.plot_ladder(chapter)
        assert [label.get_text() for label in ax.get_yticklabels()] == names
        assert [i for i, bar in enumerate(ax.patches)
                if plt.matplotlib.colors.to_hex(bar.get_facecolor()) == red] == lit
    plt.close("all")


def test_every_rung_has_its_chapter():
    assert set(lab.recall("ladder")) <= {key for keys in lab.LADDER.values() for key in keys}


def test_require_names_the_argument_and_what_is_allowed():
    lab.require(True, "x", "anything", None)
    with pytest.raises(ValueError, match="^step must be at least 0, not -1$"):
        lab.require(False, "step", "at least 0", -1)


@pytest.mark.parametrize("old, new", [("old", "neu 安"), ("old", b"\x00"), ({"a": b"1", "b": b"2"}, {"c": b"3"}),
                                      (None, "new"), (None, {"a": b"1"})])
def test_write_whole_replaces_at_once(tmp_path, old, new):
    def content():
        if not path.exists():
            return None
        return ({part.name: part.read_bytes() for part in path.iterdir()} if path.is_dir()
                else path.read_bytes())

    path = tmp_path / "deep" / "thing"
    if old is not None:
        lab.write_whole(path, old)
    before = content()
    with pytest.raises(RuntimeError), lab.replacing(path) as draft:
        draft.mkdir() if isinstance(new, dict) else draft.write_bytes(b"half")
        raise RuntimeError
    assert content() == before
    lab.write_whole(path, new)
    assert content() == (new.encode() if isinstance(new, str) else new)
    assert [part.name for part in path.parent.iterdir()] == ["thing"]


def test_two_writers_leave_one_whole_file(tmp_path):
    path, texts = tmp_path / "x", [letter * 200_000 for letter in "ab"]
    threads = [threading.Thread(target=lambda text=text: [lab.write_whole(path, text) for _ in range(20)])
               for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and [part.name for part in tmp_path.iterdir()] == ["x"]


def test_check_never_raises_for_a_wrong_answer(capsys):
    @lab.exercise("99.1")
    def judge(fn):
        assert fn() == 4, "not four"

    lab.check("99.1", lambda: 3)
    assert lab.solved["99.1"] is False and "not yet: not four" in capsys.readouterr().out
    lab.check("99.1", lambda: 1 / 0)
    assert lab.solved["99.1"] is False and "ZeroDivisionError" in capsys.readouterr().out
    lab.check("99.1", lambda: 4)
    assert lab.solved.pop("99.1") is True and "solved" in capsys.readouterr().out
    with pytest.raises(KeyError, match="99.9"):
        lab.check("99.9", lambda: 4)


def test_progress_is_quiet_on_request(monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(lab.progress(range(3), "x")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_the_package_is_light_and_lazy():
    code = ("import llm_book, sys; assert 'torch' not in sys.modules; "
            "assert 'tokens' in dir(llm_book); "
            "assert llm_book.tokens.ByteTokenizer().vocab_size == 256; "
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
    import llm_book
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llm_book.nothing
