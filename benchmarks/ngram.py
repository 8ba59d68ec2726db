"""Fitting and evaluating an order-5 Kneser–Ney model, alone and beside NLTK, on one core.

    python benchmarks/ngram.py
"""
import os

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import time

import numpy as np
from nltk.lm import KneserNeyInterpolated
from nltk.lm.preprocessing import padded_everygram_pipeline

from llm_book.lab import record
from llm_book.ngram import NGramLM
from llm_book.text import load_corpus
from llm_book.tokens import CharTokenizer

RUNS = range(5)
COMMAND = "python benchmarks/ngram.py"


def timed(work):
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def report(name: str, values: list[float], unit: str, **context) -> None:
    entry = record(f"ngram/{name}", values, unit, seeds=list(RUNS), command=COMMAND, cores=1,
                   **context)
    print(f"{name}: {entry['value']:.3f} ± {entry['sd']:.3f} {unit}")


def main() -> None:
    text = load_corpus("python_docs").text + load_corpus("toy_world").text
    text = text[:2_200_000]
    tokenizer = CharTokenizer(text)
    ids = np.array(tokenizer.encode(text))
    train, test = ids[:2_000_000], ids[2_000_000:]
    fits = [timed(lambda: NGramLM(5, tokenizer.vocab_size).fit(train)) for _ in RUNS]
    report("fit_seconds", [t for t, _ in fits], "s", work="fit order 5 on 2 million characters")
    model = fits[0][1]
    report("evaluate_seconds", [timed(lambda: model.log_prob(test))[0] for _ in RUNS], "s",
           work="evaluate 200,000")

    few, questions = text[:100_000], text[100_000:100_050]
    order, ratios_fit, ratios_score = 3, [], []
    for _ in RUNS:
        def fit_nltk():
            peer = KneserNeyInterpolated(order, discount=0.75)
            peer.fit(*padded_everygram_pipeline(order, [list(few)]))
            return peer

        theirs, peer = timed(fit_nltk)
        ours, model = timed(lambda: NGramLM(order, tokenizer.vocab_size, discount=0.75).fit(
            tokenizer.encode(few)))
        ratios_fit.append(ours / theirs)
        theirs, _ = timed(lambda peer=peer: [
            peer.score(questions[i], list(questions[i - 2:i])) for i in range(2, 50)])
        ours, _ = timed(lambda model=model: model.log_prob(tokenizer.encode(questions)))
        ratios_score.append(ours / theirs)
    about = dict(corpus="python_docs, first 100,000 characters", order=order)
    report("fit_vs_nltk", ratios_fit, "ratio of times", **about)
    report("score_vs_nltk", ratios_score, "ratio of times", questions=48, **about)


if __name__ == "__main__":
    main()
