"""Training and encoding of BPE beside Hugging Face's tokenizers and OpenAI's tiktoken, on one core.

Times are of the processor, so that other programs on the machine do not count. "Cold" is a tokenizer
that has encoded nothing yet; otherwise the same text has been encoded before, which warms its memory.

    python benchmarks/tokens.py
"""
import time

import common
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llm_book.text import load_corpus, split_text
from llm_book.tokens import GPT2_PATTERN, BPETokenizer, to_signs

BENCH = common.Bench("tokens", range(7))


def peer_tokenizers(bpe: BPETokenizer | None = None) -> Tokenizer:
    model = models.BPE()
    if bpe:
        model = models.BPE(vocab={to_signs(token): i for i, token in bpe.vocab.items()},
                           merges=[(to_signs(a), to_signs(b)) for a, b in bpe.merges])
    peer = Tokenizer(model)
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
                             "tokenizers": lambda: train_peer(small, 500)}, BENCH.runs, warm_up=0,
                            clock=time.process_time)
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
    cold = iter([BPETokenizer(bpe.vocab, bpe.merges) for _ in BENCH.runs])
    times = common.in_turns({"ours": lambda: bpe.encode(test), "tiktoken": lambda: tik.encode(test),
                             "tokenizers": lambda: hugging_face.encode(test),
                             "ours, cold": lambda: next(cold).encode(test)}, BENCH.runs, warm_up=0,
                            clock=time.process_time)
    about = dict(corpus="python_docs, test part", vocab_size=8_056, cores=1)
    size = len(test.encode()) / 1e6
    BENCH.report("encode_mb_per_second", size / times["ours"], "MB/s", **about)
    BENCH.report("encode_cold_mb_per_second", size / times["ours, cold"], "MB/s", **about)
    BENCH.report("encode_cold_vs_tiktoken", times["ours, cold"] / times["tiktoken"], "ratio of times",
                 **about)
    for peer in ("tokenizers", "tiktoken"):
        BENCH.report(f"encode_vs_{peer}", times["ours"] / times[peer], "ratio of times", **about)


if __name__ == "__main__":
    main()
