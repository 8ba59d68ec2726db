"""Fitting and evaluating an order-5 Kneser–Ney model, alone and beside NLTK, on one core.

    python benchmarks/ngram.py
"""
import common
import numpy as np
from nltk.lm import KneserNeyInterpolated
from nltk.lm.preprocessing import padded_everygram_pipeline

from llm_book.ngram import NGramLM
from llm_book.text import load_corpus
from llm_book.tokens import CharTokenizer

BENCH, ORDER = common.Bench("ngram", range(5), cores=1), 3


def fit_nltk(text: str) -> KneserNeyInterpolated:
    peer = KneserNeyInterpolated(ORDER, discount=0.75)
    peer.fit(*padded_everygram_pipeline(ORDER, [list(text)]))
    return peer


def main() -> None:
    common.one_core()
    text = (load_corpus("python_docs").text + load_corpus("toy_world").text)[:2_200_000]
    tokenizer = CharTokenizer(text)
    ids = np.array(tokenizer.encode(text))
    train, test = ids[:2_000_000], ids[2_000_000:]
    model = NGramLM(5, tokenizer.vocab_size)
    times = common.in_turns({"fit": lambda: model.fit(train)}, BENCH.runs, warm_up=0)
    BENCH.report("fit_seconds", times["fit"], "s", work="fit order 5 on 2 million characters")
    times = common.in_turns({"evaluate": lambda: model.log_prob(test)}, BENCH.runs, warm_up=0)
    BENCH.report("evaluate_seconds", times["evaluate"], "s", work="evaluate 200,000")

    few, questions = text[:100_000], text[100_000:100_050]
    small, peer = NGramLM(ORDER, tokenizer.vocab_size, discount=0.75), fit_nltk(few)
    about = dict(corpus="python_docs, first 100,000 characters", order=ORDER)
    times = common.in_turns({"ours": lambda: small.fit(tokenizer.encode(few)),
                             "nltk": lambda: fit_nltk(few)}, BENCH.runs, warm_up=0)
    BENCH.report("fit_vs_nltk", times["ours"] / times["nltk"], "ratio of times", **about)
    times = common.in_turns({"ours": lambda: small.log_prob(tokenizer.encode(questions)),
                             "nltk": lambda: [peer.score(questions[i], list(questions[i - 2:i]))
                                              for i in range(2, 50)]}, BENCH.runs, warm_up=0)
    BENCH.report("score_vs_nltk", times["ours"] / times["nltk"], "ratio of times", questions=48, **about)


if __name__ == "__main__":
    main()
