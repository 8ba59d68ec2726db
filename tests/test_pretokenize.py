"""Engine room a4: every pipeline against the library `tokenizers`, and what is refused."""
import json
import pickle
import random
import time
from functools import lru_cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from llm_book.pretokenize import PipelineTokenizer, merge_ids
from llm_book.text import load_corpus
from llm_book.tokens import merge, to_signs

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace("{1,3}", "")
GPT4O = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
WORDS = ("Anna reads her red book in the garden. It's 2024; DON'T you'll we'd I'VE naïve café cafe\u0301 Å A\u030a ﬁ ① ½ ² Ⅷ "
         "安娜在花园里读她的红书。 東京タワー ひらがな カタカナ 한국어 문장 Привет, мир! Ελληνικά العربية ١٢٣ עברית हिन्दी १२३ ไทย Tiếng Việt "
         "def f(x): return {x**2: 'a'} if x >= 10_000 else None # TODO \\n \\t <br/> https://example.org/a?b=c&d=%20 "
         "😀 👩‍👩‍👧 🇨🇭 👍🏽 ❤️ … — „“ ’s ‘t \x00 \x04 \x1d \x7f \u200b \ufeff \ufffd ▁ ▁▁ Ġ Ċ <0x41> <0x0A> \U000f0000 \U0010ffff "
         "1 12 123 1234 12345 3.14159 1e-5 0xFF aaaaaaaaaaaaaaaaaaaa ---- ==== //// ...... (((( ))))").split(" ")
SPACES = [" ", " ", " ", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "", ""]
MARKS = ["<|im_start|>", "<|im_end|>", "<tool>", "<pad>", "<|im_", "<unk>", "é<tool>"]


def lines(n: int, seed: int = 0) -> list[str]:
    """Words of many languages, code, emoji, all kinds of spaces and a few marks, in any order."""
    rng, sources = random.Random(seed), [load_corpus("python_docs").text, load_corpus("toy_world").text]
    found = ["", " ", "  ", "\n", "a", " a", "a ", "  a  ", *MARKS]
    while len(found) < n:
        if rng.random() < 0.2:
            source, at = rng.choice(sources), rng.randrange(10**5)
            found.append(source[at:at + rng.randrange(200)])
        else:
            found.append("".join(rng.choice(SPACES) + rng.choice(WORDS if rng.random() < 0.97 else MARKS)
                                 for _ in range(rng.randrange(1, 15))))
    return found


def split(pattern, how="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern), how, invert)


def then_bytes(*steps, use_regex=False):
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


ALPHABET = pre_tokenizers.ByteLevel.alphabet()
BYTES = dict(decoder=decoders.ByteLevel(), alphabet=ALPHABET)
SP_DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
LLAMA2 = dict(normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), decoder=SP_DECODER,
              model=dict(byte_fallback=True, unk_token="<unk>", fuse_unk=True), special=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)])
PIPELINES = {
    "gpt2": dict(BYTES, cut=pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2, space in front": dict(BYTES, cut=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "bytes alone": dict(BYTES, cut=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "smollm": dict(BYTES, cut=then_bytes(pre_tokenizers.Digits(individual_digits=True), use_regex=True)),
    "digits together": dict(BYTES, cut=then_bytes(pre_tokenizers.Digits(individual_digits=False), use_regex=True)),
    "llama3": dict(BYTES, cut=then_bytes(split(LLAMA3)), model=dict(ignore_merges=True)),
    "qwen": dict(BYTES, cut=then_bytes(split(QWEN)), normalizer=normalizers.NFC()),
    "gpt4o": dict(BYTES, cut=then_bytes(split(GPT4O))),
    "deepseek": dict(BYTES, cut=then_bytes(split(r"\p{N}{1,3}"), split(r"[一-龥぀-ゟ゠-ヿ]+"), split(QWEN))),
    "only matches": dict(BYTES, cut=then_bytes(split(r"\p{L}+|\p{N}", "removed", True))),
    "no matches": dict(BYTES, cut=then_bytes(split(r"[aeiou]", "removed"))),
    "a string": dict(BYTES, cut=then_bytes(pre_tokenizers.Split(".", "isolated"))),
    "two forms": dict(BYTES, cut=pre_tokenizers.ByteLevel(add_prefix_space=False),
                      normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("a", "bb")])),
    "bytes missing": dict(BYTES, cut=then_bytes(pre_tokenizers.Digits(individual_digits=True), use_regex=True), alphabet=[]),
    "bytes missing, unknown": dict(BYTES, cut=pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet=[], model=dict(unk_token="<unk>")),
    "llama2": LLAMA2,
    "llama2, all unknown apart": dict(LLAMA2, model=dict(unk_token="<unk>")),
    "mistral": dict(LLAMA2, normalizer=None, cut=pre_tokenizers.Metaspace("▁", "first", split=False)),
    "metaspace": dict(LLAMA2, normalizer=None, cut=pre_tokenizers.Metaspace("▁", "always"), decoder=decoders.Metaspace()),
    "metaspace, none in front": dict(LLAMA2, normalizer=None, cut=pre_tokenizers.Metaspace("▁", "never"), decoder=decoders.Metaspace(prepend_scheme="never")),
}


@lru_cache
def peer(name: str) -> Tokenizer:
    """A tokenizer of the library, trained with a pipeline."""
    pipeline = PIPELINES[name]
    tokenizer = Tokenizer(models.BPE(**pipeline.get("model", {})))
    for part, key in (("normalizer", "normalizer"), ("pre_tokenizer", "cut"), ("decoder", "decoder")):
        if pipeline.get(key):
            setattr(tokenizer, part, pipeline[key])
    text = load_corpus("python_docs").text[:60_000].splitlines() + load_corpus("toy_world").text[:20_000].splitlines()
    text += [line for line in lines(300, seed=1) if "\U0010ffff" not in line]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=pipeline.get("alphabet", []), special_tokens=pipeline.get("special", ["<unk>"]),
        limit_alphabet=300, max_token_length=12, show_progress=False))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=name != "llama2" and "llama2" not in name),
                          AddedToken("<pad>", lstrip=True, rstrip=True, normalized=False), AddedToken("é<tool>", normalized=False)])
    return tokenizer


@lru_cache
def ours(name: str) -> PipelineTokenizer:
    return PipelineTokenizer(json.loads(peer(name).to_str()))


def assert_same(name: str, text: str):
    theirs = peer(name).encode(text, add_special_tokens=False).ids
    assert ours(name).encode(text) == theirs, repr(text)
    assert ours(name).decode(theirs) == peer(name).decode(theirs, skip_special_tokens=False), repr(text)


@pytest.mark.parametrize("name", PIPELINES)
def test_ids_and_texts_are_those_of_the_library(name):
    for text in lines(400):
        assert_same(name, text)
    assert ours(name).vocab_size == peer(name).get_vocab_size()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "smollm", "llama3", "qwen", "llama2", "mistral"])
def test_ten_thousand_lines(name):
    for text in lines(10_000, seed=2):
        assert_same(name, text)


known = st.text(st.characters(exclude_categories=("Cs", "Cn"))) | st.text("aé \n2'S<>|▁🇨\u0301\x04", max_size=30)


@pytest.mark.parametrize("name", ["smollm", "llama3", "qwen", "bytes missing", "llama2", "mistral"])
@given(text=known)
def test_any_text(name, text):
    assert_same(name, text)


@pytest.mark.parametrize("name", ["smollm", "qwen", "llama2", "mistral"])
def test_a_strangers_text_has_no_special_tokens(name):
    peer(name).encode_special_tokens = True
    try:
        for text in lines(200, seed=3):
            assert ours(name).encode_plain(text) == peer(name).encode(text, add_special_tokens=False).ids, text
    finally:
        peer(name).encode_special_tokens = False
    marks = set(ours(name).special_tokens.values())
    assert marks & set(ours(name).encode("a<|im_end|>b")) and not marks & set(ours(name).encode_plain("a<|im_end|>b"))


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen"])
def test_any_ids_have_a_text(name):
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(ours(name).vocab_size) for _ in range(rng.randrange(12))]
        assert ours(name).decode(ids) == peer(name).decode(ids, skip_special_tokens=False)


def test_half_a_character_is_replaced():
    assert ours("gpt2").encode("a\ud800b") == ours("gpt2").encode("a\ufffdb")
    assert ours("gpt2").encode("\ud83d\ude00") == ours("gpt2").encode("😀")


# ---- merging

@given(st.lists(st.integers(0, 2), max_size=30), st.permutations([(a, b) for a in range(3) for b in range(3)]))
def test_the_heap_does_what_the_definition_says(ids, pairs):
    ranks = {pair: (rank, 3 + rank) for rank, pair in enumerate(pairs[:6])}
    ranks |= {(3, 4): (6, 9), (4, 3): (7, 10), (5, 5): (8, 11)}
    slow = list(ids)
    while found := [pair for pair in pairwise(slow) if pair in ranks]:
        pair = min(found, key=ranks.get)
        slow = merge(slow, pair, ranks[pair][1])
    assert merge_ids(ids, ranks) == slow


def test_long_words_take_time_in_proportion():
    start = time.process_time()
    for name in ("llama2", "bytes alone"):
        assert len(ours(name).encode("ab" * 100_000)) > 1000
    assert time.process_time() - start < 30


# ---- the object

def test_it_can_be_saved_pickled_and_loaded(tmp_path):
    tokenizer = ours("qwen")
    tokenizer.save(tmp_path / "tokenizer.json")
    for again in (PipelineTokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert all(again.encode(text) == tokenizer.encode(text) for text in lines(50))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).to_str() == peer("qwen").to_str()


def test_ids_that_are_not_there():
    with pytest.raises(ValueError, match=r"ids must be from the vocabulary of \d+, not \[-1, 100000\]"):
        ours("qwen").decode([-1, 5, 100_000])


def test_older_files_have_merges_as_text_and_no_type():
    content = json.loads(peer("smollm").to_str())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    del content["model"]["type"]
    older = PipelineTokenizer(content)
    assert all(older.encode(text) == ours("smollm").encode(text) for text in lines(100))


# ---- what is refused, by its name

def changed(**parts):
    content = json.loads(peer("gpt2").to_str())
    for name, value in parts.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) and name == "model" else value
    return content


def token(**options):
    return [{"id": 5, "content": "x", **options}]


BAD_SPLIT = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "MergedWithNext", "invert": False}
REFUSED = {
    "WordPiece": (dict(model={"type": "WordPiece"}), "type of model must be BPE, not 'WordPiece'"),
    "Unigram": (dict(model={"type": "Unigram"}), "type of model must be BPE, not 'Unigram'"),
    "dropout": (dict(model={"dropout": 0.1}), "dropout of BPE must be one of"),
    "end_of_word_suffix": (dict(model={"end_of_word_suffix": "</w>"}), "end_of_word_suffix of BPE must be"),
    "continuing_subword_prefix": (dict(model={"continuing_subword_prefix": "##"}), "continuing_subword_prefix of BPE"),
    "an option of tomorrow": (dict(model={"new": 1}), "new of BPE must be left out, not 1"),
    "merges": (dict(model={"merges": [["qq", "zz"]]}), "merges must be of tokens in the vocabulary"),
    "Lowercase": (dict(normalizer={"type": "Lowercase"}), "normalizer must be .* 'Lowercase'"),
    "BertNormalizer": (dict(normalizer={"type": "Sequence", "normalizers": [{"type": "BertNormalizer"}]}), "'BertNormalizer'"),
    "Replace, Regex": (dict(normalizer={"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}), "normalizer must be"),
    "Whitespace": (dict(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer must be of .* not .'Whitespace'"),
    "ByteLevel first": (dict(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}, {"type": "Digits", "individual_digits": True}]}), "ByteLevel at the end"),
    "MergedWithNext": (dict(pre_tokenizer=BAD_SPLIT), "behavior of Split must be .* not 'MergedWithNext'"),
    "escape": (dict(pre_tokenizer=BAD_SPLIT | {"behavior": "Isolated", "pattern": {"Regex": r"\w+"}}), "pattern must be one that means the same"),
    "intersection": (dict(pre_tokenizer=BAD_SPLIT | {"behavior": "Isolated", "pattern": {"Regex": r"[\p{L}&&[a-z]]"}}), "pattern must be one that"),
    "no pattern": (dict(pre_tokenizer=BAD_SPLIT | {"behavior": "Isolated", "pattern": {"Regex": "("}}), "has no tokenizer"),
    "WordPiece decoder": (dict(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "decoder must be Metaspace.* 'WordPiece'"),
    "no decoder": (dict(decoder=None), "decoder must be Metaspace.* not None"),
    "truncation": (dict(truncation={"max_length": 5}), "truncation and padding must be null"),
    "single_word": (dict(added_tokens=token(single_word=True)), "an added token must be .* single_word=True"),
    "empty token": (dict(added_tokens=token(content="")), "an added token must be a text"),
    "strange token": (dict(added_tokens=token(odd=1)), "has no tokenizer that we can read"),
    "no model": (dict(model=None), "has no tokenizer that we can read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_have_no_code_for_is_refused_by_its_name(name, tmp_path):
    parts, message = REFUSED[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(**parts)))
    with pytest.raises(ValueError, match=message):
        PipelineTokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "{}", '{"model": 3}', '{"model": {"type": "BPE"}}', '{"model": {"vocab": {}, "merges": []}}'])
def test_what_is_no_tokenizer(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="has no tokenizer that we can read"):
        PipelineTokenizer.load(tmp_path / "tokenizer.json")


def test_the_changes_above_begin_from_what_is_read():
    PipelineTokenizer(changed())
    assert to_signs(b" a") in changed()["model"]["vocab"]
