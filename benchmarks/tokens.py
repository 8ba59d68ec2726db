"""Training and encoding of BPE beside Hugging Face's tokenizers and OpenAI's tiktoken, on one core.

    python benchmarks/tokens.py
"""
import json
import tempfile
from pathlib import Path

import common
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llm_book.text import load_corpus, split_text
from llm_book.tokens import GPT2_PATTERN, BPETokenizer, to_signs

RUNS = range(7)
COMMAND = "python benchmarks/tokens.py"


def seconds(work) -> float:
    start = time.process_time()  # of the processor: other programs on the machine do not count
    work()
    return time.process_time() - start


def peer_tokenizers(bpe: BPETokenizer | None = None) -> Tokenizer:
    vocab = {to_signs(token): i for i, token in bpe.vocab.items()} if bpe else None
    merges = [(to_signs(a), to_signs(b)) for a, b in bpe.merges] if bpe else None
    peer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return peer


def train_peer(text: str, n_merges: int) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + n_merges, initial_alphabet=alphabet,
                                  show_progress=False)
    peer_tokenizers().train_from_iterator([text], trainer)


def main() -> None:
    common.one_core()
    train, _, test = split_text(load_corpus("python_docs").text)
    small = train[:130_000]
    times = common.in_turns({"ours": lambda: BPETokenizer.train(small, 256 + 500),
                             "tokenizers": lambda: train_peer(small, 500)}, BENCH.runs, warm_up=0)
    about = dict(corpus="python_docs, first 130,000 characters", merges=500, cores=1)
    BENCH.report("train_seconds", times["ours"], "s", **about)
    BENCH.report("train_vs_tokenizers", times["ours"] / times["tokenizers"], "ratio of times", **about)

    bpe = BPETokenizer.train(train, 8_056)
    hugging_face = peer_tokenizers(bpe)
    ranks = {token: i for i, token in bpe.vocab.items()}
    tik = tiktoken.Encoding("peer", pat_str=GPT2_PATTERN.pattern, mergeable_ranks=ranks,
                            special_tokens={})
    ids = bpe.encode(test)  # the warm-up, and a check that all three do the same work
    assert ids == hugging_face.encode(test).ids == tik.encode(test)
    encoders = {"ours": bpe.encode, "tokenizers": hugging_face.encode, "tiktoken": tik.encode}
    times = {name: [] for name in (*encoders, "ours, cold")}
    for _ in RUNS:
        cold = BPETokenizer(bpe.vocab, bpe.merges)  # has met no word yet
        times["ours, cold"].append(seconds(lambda cold=cold: cold.encode(test)))
        for name, encode in encoders.items():
            times[name].append(seconds(lambda encode=encode: encode(test)))
    about = dict(corpus="python_docs, test part", vocab_size=8_056, cores=1)
    size = len(test.encode()) / 1e6
    report("encode_mb_per_second", [size / t for t in times["ours"]], "MB/s", **about)
    report("encode_cold_mb_per_second", [size / t for t in times["ours, cold"]], "MB/s", **about)
    ratios = [a / b for a, b in zip(times["ours, cold"], times["tiktoken"])]
    report("encode_cold_vs_tiktoken", ratios, "ratio of times", **about)
    for peer in ("tokenizers", "tiktoken"):
        BENCH.report(f"encode_vs_{peer}", times["ours"] / times[peer], "ratio of times", **about)


if __name__ == "__main__":
    main()
