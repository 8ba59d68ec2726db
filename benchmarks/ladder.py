"""The counted rungs of the ladder: bits per byte on the test part of python_docs.

Order and weight are chosen on the validation part; the test part is used once for each rung.

    python benchmarks/ladder.py
"""
import math

import common
import numpy as np

from llm_book.lab import progress
from llm_book.ngram import NGramLM
from llm_book.text import load_corpus, split_text
from llm_book.tokens import ByteTokenizer

BENCH = common.Bench("ladder", corpus="python_docs", split="test part of split_text")
CANDIDATES = {
    "unigram": [dict(order=1, smoothing="laplace")],
    "laplace": [dict(order=n, smoothing="laplace") for n in range(2, 6)],
    "interpolated": [dict(order=n, smoothing="interpolated", weight=w)
                     for n in (4, 6, 8, 10, 12, 16) for w in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)],
    "kneser-ney": [dict(order=n, smoothing="kneser-ney") for n in (4, 6, 8, 10, 12, 16, 24)],
}
LABELS = {"uniform": "uniform", "unigram": "single bytes", "laplace": "Laplace",
          "interpolated": "interpolated", "kneser-ney": "Kneser–Ney"}


def bits_per_byte(model: NGramLM, ids: np.ndarray) -> float:
    return -model.log_prob(ids) / len(ids) / math.log(2)


def main() -> None:
    parts = split_text(load_corpus("python_docs").text)
    train, validation, test = (np.array(ByteTokenizer().encode(part)) for part in parts)
    BENCH.report("uniform", 8.0, "bits per byte", label=LABELS["uniform"], test_bytes=len(test))
    for name, candidates in CANDIDATES.items():
        fitted = ((options, NGramLM(vocab_size=256, **options).fit(train))
                  for options in progress(candidates, name))
        scores = [(bits_per_byte(model, validation), i, options, model)
                  for i, (options, model) in enumerate(fitted)]
        best, _, options, model = min(scores)
        label = LABELS[name] if options["order"] == 1 else f"{LABELS[name]}, order {options['order']}"
        BENCH.report(name, bits_per_byte(model, test), "bits per byte", label=label, validation=best,
                     options=options, candidates=len(candidates), test_bytes=len(test))


if __name__ == "__main__":
    main()
