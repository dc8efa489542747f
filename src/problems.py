"""Arithmetic problems made on the spot, in GSM8K's own format.

Most of the solutions take several calculations in one go, as people's often do, and a tiny model gets most of those
wrong. A short cold start on them teaches it the format and some arithmetic; GRPO then has to find out that writing down
one step after another is what leads to right answers.
"""

import operator
import random
import re
from pathlib import Path
from typing import Any
from zlib import crc32

LARGEST = 40  # every quantity, given or computed, lies in 0..LARGEST and is one token
SPLIT_SIZES = {"train": 4000, "test": 250}
SHORTCUT_SHARE = 0.65  # of the solutions that have steps to skip
TEST_SHARE = 4  # one in so many problems (situation and numbers) belongs to the test split

NAMES = ["Tom", "Ben", "Sam", "Ann", "Mia", "Eva"]
THINGS = ["apples", "books", "coins", "cards", "pens", "shells"]


# In problems.txt: a question with letters for its numbers, and below it the reasoning, with " / " for a line break and
# `[a+b=x]` for a calculation of x; after a bar, the reasoning in one go. a to d are drawn from 1..9; m and n, the
# factors, from 2..5.
LINES = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
SITUATIONS = list(zip(LINES[::2], LINES[1::2], strict=True))
CALCULATION = re.compile(r"\[([^=\]]+)=(\w)\]")


def synthetic_rows(split: str, seed: int) -> list[dict[str, str]]:
    """Make the rows of one split ("train" or "test") in GSM8K's own format.

    A problem's situation and numbers alone decide which split it belongs to, so the splits share no problem whatever
    their seeds. No question comes twice, and in the test split no problem does, whatever its names.

    Raises:
        KeyError: the split is neither "train" nor "test".
    """
    rng = random.Random(f"{split} {seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < SPLIT_SIZES[split]:
        question, reasoning = rng.choice(SITUATIONS)
        ways = reasoning.replace(" / ", "\n").split(" | ")  # step by step and, for some, in one go
        numbers = _draw_numbers(question, ways[0], rng)
        problem = f"{question} {numbers}"
        in_test = crc32(problem.encode()) % TEST_SHARE == 0
        if all(0 <= number <= LARGEST for number in numbers.values()) and in_test == (split == "test"):
            name, friend = rng.sample(NAMES, 2)
            words = {"name": name, "friend": friend, "things": rng.choice(THINGS)}
            way = ways[-1] if rng.random() < SHORTCUT_SHARE else ways[0]
            row = _write_row(question, way, words | numbers)
            rows[problem if in_test else row["question"]] = row
    return list(rows.values())


def _draw_numbers(question: str, reasoning: str, rng: random.Random) -> dict[str, int]:
    """Draw a value for every letter of the question, then compute the letters of the steps, in order."""
    letters = re.findall(r"{([a-z])}", question)
    numbers = {letter: rng.randint(2, 5) if letter in "mn" else rng.randint(1, 9) for letter in letters}
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    for (left, sign, right), result in CALCULATION.findall(reasoning):
        numbers[result] = apply[sign](numbers[left], numbers[right])
    return numbers


def _write_row(question: str, reasoning: str, values: dict[str, Any]) -> dict[str, str]:
    """Fill in names, things and numbers, of which the last is the answer; `[a+b=x]` becomes `3+4=<<3+4=7>>7`."""

    def calculate(match: re.Match[str]) -> str:
        terms = "".join(str(values.get(symbol, symbol)) for symbol in match[1])
        return f"{terms}=<<{terms}={values[match[2]]}>>{values[match[2]]}"

    reasoning = CALCULATION.sub(calculate, reasoning.format(**values))
    return {"question": question.format(**values), "answer": f"{reasoning}\n#### {[*values.values()][-1]}"}
