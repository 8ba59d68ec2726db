"""Chapter 08: token files, batches, packing."""
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_book.data import (
    TokenFile,
    document_mask,
    encode_file,
    fingerprint,
    get_batch,
    pack,
    sequential_batches,
)
from llm_book.text import load_corpus
from llm_book.tokens import BPETokenizer, ByteTokenizer, CharTokenizer

BYTE = ByteTokenizer()


class Large:
    """A tokenizer of 100,000 ids."""

    vocab_size = 100_000

    def save(self, path):
        path.write_text("large")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.integers(0, 255), max_size=300))
def test_what_is_written_is_read(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("ids") / "a.bin"
    file = TokenFile.write(path, iter(ids), BYTE)
    assert len(file) == len(ids) and file[:].tolist() == ids and file.ids.dtype == np.uint16
    again = TokenFile(path, BYTE)
    assert again.fingerprint == fingerprint(BYTE) and np.array_equal(np.asarray(again), ids)
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_large_vocabularies_take_four_bytes(tmp_path):
    file = TokenFile.write(tmp_path / "a", [0, 65_536, 99_999], Large())
    assert file.ids.dtype == np.uint32 and file[:].tolist() == [0, 65_536, 99_999]


def test_longer_than_one_chunk(tmp_path):
    ids = np.random.default_rng(0).integers(0, 256, 200_000)
    file = TokenFile.write(tmp_path / "a", ids.tolist(), BYTE)
    assert np.array_equal(file[:], ids) and file[-1] == ids[-1]
    with pytest.raises(ValueError, match="read-only"):
        file.ids[0] = 1


@pytest.mark.parametrize("bad", [[0, 256], [-1], [0.5], [70_000]])
def test_a_failed_write_keeps_the_old_file(tmp_path, bad):
    path = tmp_path / "a"
    TokenFile.write(path, [1, 2, 3], BYTE)
    with pytest.raises(ValueError, match="ids must be integers from 0 to 255"):
        TokenFile.write(path, iter(bad), BYTE)

    def breaks():
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenFile.write(path, breaks(), BYTE)
    assert TokenFile(path)[:].tolist() == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_refuses_foreign_truncated_and_other_tokenizers(tmp_path):
    path = tmp_path / "a"
    TokenFile.write(path, range(200), BYTE)
    whole = path.read_bytes()
    for content, message in ((whole[:-1], "complete"), (whole + b"x", "complete"),
                             (whole[:20], "must be a token file"), (b"", "must be a token file"),
                             (b"x" + whole[1:], "must be a token file"),
                             (whole[:8] + b"\x09" + whole[9:], "version")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            TokenFile(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="tokenizer must be the one"):
        TokenFile(path, CharTokenizer("abc"))


@pytest.mark.parametrize("tokenizer", [BYTE, CharTokenizer("ab é\n"), BPETokenizer.train("ab ab é", 262)])
def test_encode_file_equals_encoding_the_whole(tmp_path, tokenizer):
    text = "ab a\u0301 b\r\n\nab  é\n"
    text = text.replace("a\u0301", "a")
    (tmp_path / "t.txt").write_bytes(text.encode())
    file = encode_file(tmp_path / "t.txt", tmp_path / "t.bin", tokenizer)
    assert file[:].tolist() == tokenizer.encode(text.replace("\r\n", "\n"))


def test_encode_file_needs_little_memory_and_refuses_other_encodings(tmp_path):
    line, peaks = "Anna reads her red book in the garden.\n", []
    for n in (40_000, 160_000):
        (tmp_path / "t.txt").write_text(line * n)
        tracemalloc.start()
        assert len(encode_file(tmp_path / "t.txt", tmp_path / "t.bin", BYTE)) == n * len(line)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
    (tmp_path / "t.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="0xE9"):
        encode_file(tmp_path / "t.txt", tmp_path / "new.bin", BYTE)
    assert not (tmp_path / "new.bin").exists()


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 9), st.sampled_from(["list", "array", "tensor"]))
def test_batches_are_windows_shifted_by_one(batch_size, seq_len, extra, kind):
    ids = list(range(10, 10 + seq_len + 1 + extra))
    tokens = {"list": ids, "array": np.array(ids, np.uint16), "tensor": torch.tensor(ids)}[kind]
    x, y = get_batch(tokens, batch_size, seq_len, "cpu", generator())
    assert x.shape == y.shape == (batch_size, seq_len) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1) and x.min() >= 10 and y.max() <= ids[-1]


def test_every_start_is_reached_equally_often():
    n_starts, draws = 20, 40_000
    x, _ = get_batch(np.arange(n_starts + 3), draws, 3, "cpu", generator(1))
    counts = torch.bincount(x[:, 0], minlength=n_starts)
    assert len(counts) == n_starts and counts.min() > 0
    chi_square = ((counts - draws / n_starts) ** 2 / (draws / n_starts)).sum().item()
    assert chi_square < 43.8  # 99.9 % quantile with 19 degrees of freedom


def test_batches_follow_the_generator(tmp_path):
    file = TokenFile.write(tmp_path / "a", (i % 256 for i in range(5_000)), BYTE)
    first = get_batch(file, 4, 8, "cpu", generator(3))
    torch.rand(5)  # the global dice do not matter
    assert all(map(torch.equal, first, get_batch(file, 4, 8, "cpu", generator(3))))
    g = generator(3)
    get_batch(file, 4, 8, "cpu", g)
    state, second = g.get_state(), get_batch(file, 4, 8, "cpu", g)
    g.set_state(state)
    assert all(map(torch.equal, second, get_batch(file, 4, 8, "cpu", g)))


@given(st.integers(2, 60), st.integers(1, 4), st.integers(1, 9))
def test_sequential_batches_price_each_token_once(n, batch_size, seq_len):
    ids, targets = np.arange(100, 100 + n), []
    for x, y in sequential_batches(ids, batch_size, seq_len):
        assert x.shape == y.shape and x.shape[0] <= batch_size and x.shape[1] <= seq_len
        assert torch.equal(y, x + 1)
        targets += y.flatten().tolist()
    assert targets == ids[1:].tolist()


@pytest.mark.parametrize("arguments, message", [
    (([1, 2, 3], 0, 1), "batch_size must be at least 1"), (([1, 2, 3], 1, 0), "seq_len must"),
    (([1, 2, 3], 1, 3), "at least 4"), (([0.5, 1.0], 1, 1), "integers"),
    ((np.zeros((2, 2), int), 1, 1), "flat sequence"),
])
def test_get_batch_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_batch(*arguments, "cpu", generator())


documents = st.lists(st.lists(st.integers(1, 5), max_size=7), min_size=1, max_size=5)


@given(documents, st.integers(1, 6))
def test_pack_and_mask(docs, seq_len):
    x, y = pack(docs, 0, seq_len)
    tape = [0] + [token for doc in docs for token in (*doc, 0)]
    counted = y.flatten() != -100
    assert x.shape == y.shape and x.shape[1] == seq_len
    assert y.flatten()[counted].tolist() == tape[1:]
    assert x.flatten()[:len(tape) - 1].tolist() == tape[:-1]
    mask = document_mask(x, 0)
    assert mask.shape == (*x.shape, seq_len)
    for row, allowed in zip(x.tolist(), mask):
        number = np.cumsum([token == 0 for token in row])
        assert allowed.tolist() == (number[:, None] == number[None]).tolist()


@pytest.mark.parametrize("arguments, message", [
    (([[1, 0]], 0, 4), "document 0 must be without the separator 0"), (([], 0, 4), "at least one"), (([[1]], 0, 0), "seq_len"),
])
def test_pack_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack(*arguments)


def test_two_readers_at_once(tmp_path):
    file = TokenFile.write(tmp_path / "a", (i % 251 for i in range(50_000)), BYTE)
    found = [None, None]

    def read(i):
        found[i] = [get_batch(file, 8, 32, "cpu", generator(5)) for _ in range(50)]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*found))


def test_a_file_is_encoded_as_its_whole_text(tmp_path):
    """A byte-order mark is dropped at the start of a text, not at the start of each line."""
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\r\nthree\n")
    tokenizer = ByteTokenizer()
    found = encode_file(path, tmp_path / "marked.bin", tokenizer)[:].tolist()
    assert found == tokenizer.encode(load_corpus(path).text)


def test_a_text_is_not_overwritten_by_its_tokens(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("text")
    with pytest.raises(ValueError, match="tokens_path must be another file than text_path"):
        encode_file(path, tmp_path / "." / "s.txt", ByteTokenizer())
    assert path.read_text() == "text"


def test_pack_takes_iterators_and_slices_of_files(tmp_path):
    x, y = pack((iter(document) for document in ([1, 2], [3])), 0, 4)
    assert x.tolist() == [[0, 1, 2, 0], [3, 0, 0, 0]] and y.tolist() == [[1, 2, 0, 3], [0, -100, -100, -100]]
    file = TokenFile.write(tmp_path / "t.bin", [1, 2, 3, 4, 5], ByteTokenizer())
    x, y = pack([file[0:2], file[3:5]], 0, 4)
    assert x.dtype == y.dtype == torch.int64 and x.tolist() == [[0, 1, 2, 0], [4, 5, 0, 0]]


def test_two_writers_leave_one_whole_file(tmp_path):
    path, rows = tmp_path / "t.bin", ([1] * 70_000, [2] * 70_000)
    threads = [threading.Thread(target=lambda row=row: [TokenFile.write(path, row, ByteTokenizer()) for _ in range(5)])
               for row in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert TokenFile(path)[:].tolist() in rows and [part.name for part in tmp_path.iterdir()] == ["t.bin"]
