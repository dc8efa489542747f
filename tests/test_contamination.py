"""Test problems that are in the training data: found, and nothing else; fast; equal to comparing every pair."""

import logging
import os
import random
import time

import pytest

from src.contamination import NEAR, find_overlap, report_overlap
from src.data import Example, load_examples

CLIPS = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many?"


def problems(*questions: str) -> list[Example]:
    return [Example(question, "r", "o", "1") for question in questions]


def counts(train: str, test: str) -> tuple[int, int]:
    exact, near = find_overlap(problems("Another one?", train), problems(test))
    return len(exact), len(near)


@pytest.mark.parametrize(
    "other",
    [CLIPS, CLIPS.upper(), CLIPS.replace(" ", "\n "), CLIPS.replace(",", " –").rstrip("?"), f"“{CLIPS}”"],
)
def test_case_spaces_and_punctuation_do_not_hide_a_copy(other: str) -> None:
    assert counts(CLIPS, other) == (1, 0) == counts(other, CLIPS)


@pytest.mark.parametrize(
    "other",
    [
        CLIPS.replace("Natalia", "Maria"),
        CLIPS.replace("clips", "pens").replace("How many?", "How many pens?"),
        CLIPS.replace("and then she sold", "and sold"),
        "In April, Natalia sold clips to 48 of her friends, and then she sold half as many clips in May. How many?",
    ],
)
def test_other_names_and_phrases_are_nearly_a_copy(other: str) -> None:
    assert counts(CLIPS, other) == (0, 1) == counts(other, CLIPS)


@pytest.mark.parametrize(
    "other",
    [
        CLIPS.replace("48", "49"),
        CLIPS.replace("48", "4.8"),
        CLIPS.replace("48", "4 of 8"),
        CLIPS.replace("How many?", "How many 48?"),
        "Natalia had 48 clips. She gave some to her friends in April and sold the rest in May. How much did she earn?",
        "",
        "?!",
    ],
)
def test_other_numbers_or_other_words_are_another_problem(other: str) -> None:
    assert counts(CLIPS, other) == (0, 0) == counts(other, CLIPS)


def test_nothing_overlaps_with_nothing() -> None:
    assert find_overlap([], problems(CLIPS)) == ([], []) == find_overlap(problems(CLIPS), [])


def test_it_finds_what_comparing_every_pair_finds() -> None:
    rng = random.Random(0)

    def question() -> str:
        return " ".join([*rng.choices("abcdefghij", weights=range(1, 11), k=rng.randint(1, 9)), rng.choice("12")])

    train, test = problems(*(question() for _ in range(300))), problems(*(question() for _ in range(300)))

    def similar(one: str, two: str) -> bool:
        a, b = set(one.split()), set(two.split())
        return one.split()[-1] == two.split()[-1] and len(a & b) / len(a | b) >= NEAR

    copies = {e.question for e in train}
    exact = [e for e in test if e.question in copies]
    near = [e for e in test if e not in exact and any(similar(e.question, other.question) for other in train)]
    assert find_overlap(train, test) == (exact, near) and len(exact) > 10 and len(near) > 10


def test_what_is_found_is_said_once_and_listed_in_the_log_file(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        report_overlap(problems(CLIPS, "One?"), problems(CLIPS.replace("Natalia", "Maria"), "one", "Two?"))
        report_overlap(problems("One?"), problems("Two?"))
    said = "data: of {} test problems {} are also training problems, and {} nearly so"
    assert [(record.levelname, record.message[:80]) for record in caplog.records] == [
        ("WARNING", (said.format(3, 1, 1) + ": accuracy will flatter the model")[:80]),
        ("DEBUG", "also a training problem, or nearly so: 'one'"),
        ("DEBUG", f"also a training problem, or nearly so: 'Maria{CLIPS[7:]}'"[:80]),
        ("INFO", said.format(1, 0, 0)),
    ]


def test_the_splits_of_the_synthetic_problems_do_not_overlap() -> None:
    assert find_overlap(*(load_examples("synthetic", split)[0] for split in ("train", "test"))) == ([], [])


@pytest.mark.skipif("GSM8K_DIR" not in os.environ, reason="set GSM8K_DIR to a folder with GSM8K's train and test files")
def test_gsm8k_is_checked_in_seconds_and_has_no_overlap() -> None:
    train, test = (load_examples(os.environ["GSM8K_DIR"], split)[0] for split in ("train", "test"))
    start = time.process_time()
    assert find_overlap(train, test) == ([], [])
    assert time.process_time() - start < 3
