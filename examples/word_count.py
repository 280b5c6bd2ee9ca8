"""Word count: a task per part of a text, then tasks that add the counts in pairs until one is left.

Run it with `python examples/word_count.py [FILE]`. Without a file it counts the words of the United States Declaration
of Independence (1776, public domain), which stands beside this program. Counts travel by reference: this process sees
only the last one.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import zray

TEXT = Path(__file__).parent / "texts" / "declaration_of_independence.txt"


def words_of(text: str) -> list[str]:
    """Return the words of `text` in lower case, without punctuation."""
    return re.findall(r"[a-z]+(?:['-][a-z]+)*", text.lower())


@zray.remote
def count_words(part: str) -> Counter[str]:
    """Return how often each word occurs."""
    return Counter(words_of(part))


@zray.remote
def merge(left: Counter[str], right: Counter[str]) -> Counter[str]:
    """Return the sum of two counts."""
    return left + right


def count_in_parallel(text: str) -> Counter[str]:
    """Return the count of all words, made by one task per paragraph and a tree of merges."""
    counts = [count_words.remote(paragraph) for paragraph in text.split("\n\n")]
    while len(counts) > 1:
        pairs = zip(counts[::2], counts[1::2])
        odd = counts[len(counts) // 2 * 2 :]
        counts = [merge.remote(left, right) for left, right in pairs] + odd
    return zray.get(counts[0])


def main() -> None:
    """Count in parallel, compare with an ordinary count, print the ten most frequent words."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else TEXT
    text = file.read_text(encoding="utf-8")
    with zray.init():
        counts = count_in_parallel(text)
    if counts != Counter(words_of(text)):
        raise SystemExit("the parallel count differs from the ordinary one")
    print(f"{file.name}: {counts.total()} words, {len(counts)} different")
    for word, count in counts.most_common(10):
        print(f"{count:6d} {word}")


if __name__ == "__main__":
    main()
