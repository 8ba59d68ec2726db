"""Chapter 01: normalising, splitting, the two corpora, downloads."""
import hashlib
import http.server
import threading
import unicodedata

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
        assert "long enough for 2 parts" in str(error)
    else:
        assert first + second == text and first.endswith("|")


@pytest.mark.parametrize("fractions", [(0.5, 0.6), (1.2, -0.2), (0.5, 0.5, 0.0),
                                       (float("nan"), 0.5)])
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
    with pytest.raises(ValueError, match="with text in it"):
        t.load_corpus(bad)
    bad.write_bytes("\ufeffe\u0301\r\n".encode())
    corpus = t.load_corpus(bad)
    assert corpus.text == "é\n" and corpus.name == "bad.txt"


def test_python_docs():
    text = t.python_docs()
    documents = text.removesuffix("\n").split("\n\n\n")
    assert len(text) > 500_000 and len(set(documents)) == len(documents)
    assert t.normalise(text) == text and min(map(len, documents)) >= 80
    fingerprints = [hashlib.sha256(document.encode()).hexdigest() for document in documents]
    assert fingerprints == sorted(fingerprints)
    train, _, test = (set(part.split("\n\n\n")) for part in t.split_text(text))
    assert not (train & test) - {""}


def test_without_repeats_drops_copies():
    a, b = "one two three four five six seven", "eight nine ten eleven twelve thirteen"
    assert t.without_repeats([a, b, a + " eight", a]) == [a, b]


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


def test_load_corpus_by_download(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_BOOK_CACHE", str(tmp_path))
    monkeypatch.setitem(t.DOWNLOADS, "tiny_shakespeare",
                        dict(url=f"{server}/input.txt", sha256=GOOD, license="public domain"))
    corpus = t.load_corpus("tiny_shakespeare")
    assert corpus.text == "to be or not" and corpus.license == "public domain"
    assert t.load_corpus("toy_world").license and t.load_corpus("python_docs").source
