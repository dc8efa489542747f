"""Test problems that are also training problems, word for word or nearly so."""

import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

from src.data import Example

log = logging.getLogger(__name__)

NEAR = 0.8  # share of the distinct words of two problems that both have
WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+")


class Words(NamedTuple):
    """A question without its case, spaces and punctuation."""

    sequence: tuple[str, ...]
    distinct: frozenset[str]
    numbers: tuple[str, ...]


def _words(example: Example) -> Words:
    sequence = tuple(WORD.findall(example.question.casefold()))
    return Words(sequence, frozenset(sequence), tuple(word for word in sequence if word[0].isdigit()))


def find_overlap(train: Sequence[Example], test: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The test problems that also are training problems, and those that nearly are.

    The first have the same words and numbers in the same order. The others have the same numbers in the same order as
    a training problem, and at least `NEAR` of the distinct words of the two (Jaccard): names or phrases were changed.
    Two such sets share one of their rarest words (prefix filtering, Bayardo et al. 2007), so only those are compared.
    """
    train_words, test_words = list(map(_words, train)), list(map(_words, test))
    frequency = Counter(word for words in train_words + test_words for word in words.distinct)

    def rarest(words: Words) -> list[str]:
        ordered = sorted(words.distinct, key=lambda word: (frequency[word], word))
        return ordered[: len(ordered) - math.ceil(NEAR * len(ordered)) + 1]

    index: dict[str, list[Words]] = defaultdict(list)
    for words in train_words:
        for word in rarest(words):
            index[word].append(words)

    def is_near(words: Words) -> bool:
        others = (other for word in rarest(words) for other in index[word] if other.numbers == words.numbers)
        return any(len(words.distinct & o.distinct) >= NEAR * len(words.distinct | o.distinct) for o in others)

    copies = {words.sequence for words in train_words}
    exact = [words.sequence in copies for words in test_words]
    near = [not copy and is_near(words) for copy, words in zip(exact, test_words, strict=True)]
    return list(compress(test, exact)), list(compress(test, near))


def report_overlap(train: Sequence[Example], test: Sequence[Example]) -> None:
    """Say in the log how many there are, and which."""
    exact, near = find_overlap(train, test)
    message = "data: of %d test problems %d are also training problems, and %d nearly so"
    message += ": accuracy will flatter the model" if exact or near else ""
    log.log(logging.WARNING if exact or near else logging.INFO, message, len(test), len(exact), len(near))
    for example in exact + near:
        log.debug("also a training problem, or nearly so: %r", example.question)
