"""Training and encoding of BPE beside Hugging Face's tokenizers and OpenAI's tiktoken, on one core.

    python benchmarks/tokens.py
"""
import os

os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import time

import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llm_book.lab import record
from llm_book.text import load_corpus, split_text
from llm_book.tokens import GPT2_PATTERN, BPETokenizer, _to_signs

RUNS = range(7)
COMMAND = "python benchmarks/tokens.py"


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peer_tokenizers(bpe: BPETokenizer | None = None) -> Tokenizer:
    vocab = {_to_signs(token): i for i, token in bpe.vocab.items()} if bpe else None
    merges = [(_to_signs(a), _to_signs(b)) for a, b in bpe.merges] if bpe else None
    peer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return peer


def train_peer(text: str, n_merges: int) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + n_merges, initial_alphabet=alphabet,
                                  show_progress=False)
    peer_tokenizers().train_from_iterator([text], trainer)


def report(name: str, values: list[float], unit: str, **context) -> None:
    entry = record(f"tokens/{name}", values, unit, seeds=list(RUNS), command=COMMAND, **context)
    print(f"{name}: {entry['value']:.3f} ± {entry['sd']:.3f} {unit}")


def main() -> None:
    train, _, test = split_text(load_corpus("python_docs").text)
    small = train[:130_000]
    ours = [seconds(lambda: BPETokenizer.train(small, 256 + 500)) for _ in RUNS]
    theirs = [seconds(lambda: train_peer(small, 500)) for _ in RUNS]
    about = dict(corpus="python_docs, first 130,000 characters", merges=500, cores=1)
    report("train_seconds", ours, "s", **about)
    report("train_vs_tokenizers", [a / b for a, b in zip(ours, theirs)], "ratio of times", **about)

    bpe = BPETokenizer.train(train, 8_056)
    hugging_face = peer_tokenizers(bpe)
    ranks = {token: i for i, token in bpe.vocab.items()}
    tik = tiktoken.Encoding("peer", pat_str=GPT2_PATTERN.pattern, mergeable_ranks=ranks,
                            special_tokens={})
    ids = bpe.encode(test)  # the warm-up, and a check that all three do the same work
    assert ids == hugging_face.encode(test).ids == tik.encode(test)
    encoders = {"ours": bpe.encode, "tokenizers": hugging_face.encode, "tiktoken": tik.encode}
    times = {name: [] for name in encoders}
    for _ in RUNS:
        for name, encode in encoders.items():
            times[name].append(seconds(lambda encode=encode: encode(test)))
    about = dict(corpus="python_docs, test part", vocab_size=8_056, cores=1)
    size = len(test.encode()) / 1e6
    report("encode_mb_per_second", [size / t for t in times["ours"]], "MB/s", **about)
    for peer in ("tokenizers", "tiktoken"):
        ratios = [a / b for a, b in zip(times["ours"], times[peer])]
        report(f"encode_vs_{peer}", ratios, "ratio of times", **about)


if __name__ == "__main__":
    main()
