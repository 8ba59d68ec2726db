"""Chapter 01: normalising, splitting, the two corpora, downloads."""
import hashlib
import http.server
import itertools
import math
import threading
import unicodedata
from string import Formatter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_book import text as t


@given(st.text())
def test_normalise_is_idempotent_nfc(string):
    once = t.normalise(string)
    assert t.normalise(once) == once and "\r" not in once
    assert unicodedata.is_normalized("NFC", once)


@given(st.lists(st.text("ab\n ", min_size=1), min_size=3), st.integers(1, 8))
def test_split_text_loses_nothing_and_cuts_at_boundaries(documents, tenths):
    text = "".join(document + "|" for document in documents)
    try:
        first, second = t.split_text(text, (tenths / 10, 1 - tenths / 10), boundary="|")
    except ValueError as error:
        assert "boundaries" in str(error)
    else:
        assert first + second == text and first.endswith("|")


@pytest.mark.parametrize("fractions", [(0.5, 0.6), (1.2, -0.2), (0.5, 0.5, 0.0)])
def test_split_text_refuses_fractions(fractions):
    with pytest.raises(ValueError, match="fractions must"):
        t.split_text("a\n\n\nb", fractions)


def test_read_text_errors_name_file_and_offset(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        t.read_text(tmp_path / "nowhere.txt")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"bad.txt.*0xFF at offset 3"):
        t.read_text(bad)
    bad.write_text(" \n")
    with pytest.raises(ValueError, match="no text"):
        t.load_corpus(bad)
    bad.write_bytes("\ufeffe\u0301\r\n".encode())
    corpus = t.load_corpus(bad)
    assert corpus.text == "é\n" and corpus.name == "bad.txt"


def enumerate_texts(grammar, symbol):
    """Every derivation: (probability, English, Chinese)."""
    total = sum(weight for weight, _, _ in grammar[symbol])
    for weight, *templates in grammar[symbol]:
        names = t._children(templates[0])
        for parts in itertools.product(*(list(enumerate_texts(grammar, name)) for name in names)):
            fills = [{name: part[i] for name, part in zip(names, parts)} for i in (1, 2)]
            yield (weight / total * math.prod(part[0] for part in parts),
                   *(template.format(**fill) for template, fill in zip(templates, fills)))


def test_entropy_and_lengths_by_brute_force():
    texts = list(enumerate_texts(t.GRAMMAR, "clause"))
    assert sum(p for p, _, _ in texts) == pytest.approx(1)
    for language in (1, 2):  # unambiguous in both languages
        assert len({text[language] for text in texts}) == len(texts)
    assert t.grammar_entropy("clause") == pytest.approx(-sum(p * math.log2(p) for p, *_ in texts))
    small = {**t.GRAMMAR, "clause": [(1, "{colour}x", "{colour}y"), (2, "z", "w")]}
    texts = list(enumerate_texts(small, "sentence"))
    assert len({english for _, english, _ in texts}) == len(texts)
    assert t.grammar_entropy("sentence", small) == pytest.approx(
        -sum(p * math.log2(p) for p, *_ in texts))
    mean_bytes = sum(p * len(zh.encode()) for p, _, zh in texts)
    measured = t.expected("sentence", lambda p, e, z: len(
        "".join(lit for lit, *_ in Formatter().parse(z)).encode()), small)
    assert measured == pytest.approx(mean_bytes)


def test_both_languages_use_the_same_names():
    for rules in t.GRAMMAR.values():
        for weight, english, chinese in rules:
            assert weight > 0 and sorted(t._children(english)) == sorted(t._children(chinese))
            assert len(set(t._children(english))) == len(t._children(english))


def test_toy_world_is_seeded_and_agrees_with_its_entropy():
    assert t.toy_world(50, seed=1) == t.toy_world(50, seed=1) != t.toy_world(50, seed=2)
    rng = np.random.default_rng(0)
    drawn = [t.derive("sentence", rng) for _ in range(4_000)]
    bits = np.array([b for _, _, b in drawn])
    assert abs(bits.mean() - t.grammar_entropy()) < 4 * bits.std() / math.sqrt(len(bits))
    n_bytes = np.array([len(english.encode()) + 1 for english, _, _ in drawn])
    assert bits.sum() / n_bytes.sum() == pytest.approx(t.toy_entropy("english"), rel=0.02)
    chinese = sum(len(zh.encode()) + 1 for _, zh, _ in drawn)
    assert bits.sum() / chinese == pytest.approx(t.toy_entropy("chinese"), rel=0.02)
    assert bits.sum() / (chinese + n_bytes.sum()) == pytest.approx(t.toy_entropy("both"), rel=0.02)
    with pytest.raises(ValueError, match="language must"):
        t.toy_entropy("latin")


def test_agreement_of_her_and_his():
    women = {english for _, english, _ in t._rules(t.GRAMMAR, "woman")}
    for line in t.toy_world(2_000, seed=3).splitlines():
        for clause in line.split("\t")[0].rstrip(".").split(" and "):
            clause = clause.removeprefix("today ").removeprefix("in the morning ")
            is_woman = any(clause.startswith(name + " ") for name in women)
            assert (" his " if is_woman else " her ") not in clause


def test_python_docs():
    text = t.python_docs()
    documents = text.removesuffix("\n").split("\n\n\n")
    assert len(text) > 500_000 and len(set(documents)) == len(documents)
    assert t.normalise(text) == text and min(map(len, documents)) >= 80
    assert [t._fingerprint(d) for d in documents] == sorted(map(t._fingerprint, documents))
    train, _, test = (set(part.split("\n\n\n")) for part in t.split_text(text))
    assert not (train & test) - {""}


def test_without_repeats_drops_copies():
    a, b = "one two three four five six seven", "eight nine ten eleven twelve thirteen"
    assert t._without_repeats([a, b, a + " eight", a]) == [a, b]


class Handler(http.server.BaseHTTPRequestHandler):
    hits = 0

    def do_GET(self):
        type(self).hits += 1
        self.send_response(404 if "missing" in self.path else 200)
        body = b"to be or not"
        self.send_header("Content-Length", str(len(body) + (5 if "short" in self.path else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


GOOD = hashlib.sha256(b"to be or not").hexdigest()


def test_download_once_and_checked(server, tmp_path):
    Handler.hits = 0
    path = t.download(f"{server}/a.txt", GOOD, tmp_path)
    assert path.read_bytes() == b"to be or not"
    assert t.download(f"{server}/a.txt", GOOD, tmp_path) == path and Handler.hits == 1


@pytest.mark.parametrize("page, sha256, error, message", [
    ("a.txt", "0" * 64, ValueError, "SHA-256"),
    ("missing.txt", GOOD, ConnectionError, "cannot fetch"),
    ("short.txt", GOOD, ConnectionError, "cannot fetch"),
])
def test_failed_download_leaves_nothing(server, tmp_path, page, sha256, error, message):
    with pytest.raises(error, match=message):
        t.download(f"{server}/{page}", sha256, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_download_offline_and_insecure(tmp_path):
    with pytest.raises(ConnectionError, match="python_docs"):
        t.download("http://127.0.0.1:9/a.txt", GOOD, tmp_path)
    for url in ("http://example.org/a.txt", "file://localhost/a.txt"):
        with pytest.raises(ValueError, match="https"):
            t.download(url, GOOD, tmp_path)


def test_a_spoilt_cache_is_fetched_anew(server, tmp_path):
    path = t.download(f"{server}/a.txt", GOOD, tmp_path)
    path.write_bytes(b"evil")
    assert t.download(f"{server}/a.txt", GOOD, tmp_path).read_bytes() == b"to be or not"


def test_a_rule_names_each_symbol_once():
    with pytest.raises(ValueError, match="each symbol once"):
        t.derive("a", np.random.default_rng(0), {"a": [(1, "{b}{b}", "{b}")], "b": [(1, "x", "y")]})


def test_load_corpus_by_download(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_BOOK_CACHE", str(tmp_path))
    monkeypatch.setitem(t.DOWNLOADS, "tiny_shakespeare",
                        dict(url=f"{server}/input.txt", sha256=GOOD, license="public domain"))
    corpus = t.load_corpus("tiny_shakespeare")
    assert corpus.text == "to be or not" and corpus.license == "public domain"
    assert t.load_corpus("toy_world").license and t.load_corpus("python_docs").source
