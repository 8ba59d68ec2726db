"""Zipf and Heaps counts of a Chinese text, for chapter 1.

    python benchmarks/text.py --data chnsenticorp.csv   # label,review in each row

Without --data nothing is measured: the text is not part of the project.
"""
import argparse
import csv
from collections import Counter

import common
import numpy as np

from llm_book.text import normalise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="ChnSentiCorp as CSV")
    args = parser.parse_args()
    if not args.data:
        print("skipped: name the CSV file of ChnSentiCorp with --data")
        return
    with open(args.data, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    text = normalise("".join(review for _, review in rows))
    characters = [char for char in text if "\u4e00" <= char <= "\u9fff"]
    counts = np.array(sorted(Counter(characters).values(), reverse=True))
    ranks = np.unique(np.geomspace(1, len(counts), 60).astype(int))
    first_seen = np.sort(np.unique(characters, return_index=True)[1])
    read = np.unique(np.geomspace(100, len(characters), 30).astype(int))
    different = np.searchsorted(first_seen, read)
    bench = common.Bench("text", command="python benchmarks/text.py --data chnsenticorp.csv")
    bench.report("chnsenticorp_characters", len(counts), "different Chinese characters",
                 data="ChnSentiCorp, all reviews in file order", characters=len(characters),
                 reviews=len(rows), ranks=ranks.tolist(),
                 shares=[float(f"{share:.3g}") for share in counts[ranks - 1] / len(characters)],
                 read=read.tolist(), different=different.tolist())


if __name__ == "__main__":
    main()
