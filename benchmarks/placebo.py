"""A reward that knows nothing: right or wrong at random. What a run with it gains is not learned from right answers."""

import hashlib


def random_accuracy(completion: str, answer: str) -> float:
    """1 for one text in ten, always the same ones, whatever the answer."""
    return float(hashlib.sha256(completion.encode()).digest()[0] < 26)
