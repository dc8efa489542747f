import re
from collections import Counter

import pytest

from src.data import format_target, parse_row
from src.problems import synthetic_rows
from tests.helpers import score

# The problems solved a second time, from the words of their questions alone.
SOLUTIONS = [
    (r"has (\d+) \w+ and finds (\d+) more\.", lambda a, b: a + b),
    (r"has (\d+) \w+ and gives (\d+) to", lambda a, b: a - b),
    (r"has (\d+) boxes of (\d+) \w+\. How", lambda m, n: m * n),
    (r"has (\d+) \w+, buys (\d+) and finds (\d+)\.", lambda a, b, c: a + b + c),
    (r"has (\d+) \w+, buys (\d+) and loses (\d+)\.", lambda a, b, c: a + b - c),
    (r"has (\d+) boxes of (\d+) \w+ and (\d+) more\.", lambda m, n, a: m * n + a),
    (r"has (\d+) \w+\. \w+ has (\d+) more than", lambda a, b: a + a + b),
    (r"bus has (\d+) people\. Then (\d+) get off, (\d+) get on and (\d+) get on", lambda a, b, c, d: a - b + c + d),
]
CALCULATION = re.compile(r"(\d+(?:[-+*]\d+)+)=<<([-+*\d]+)=(\d+)>>(\d+)")


@pytest.fixture(scope="module")
def splits():
    return {split: synthetic_rows(split, seed=0) for split in ("train", "test")}


@pytest.fixture(scope="module")
def rows(splits):
    return splits["train"] + splits["test"]


def solve(question):
    """Which solution fits the question, the numbers it finds there, and the result."""
    fits = [(i, re.search(pattern, question)) for i, (pattern, _) in enumerate(SOLUTIONS)]
    ((kind, match),) = [(i, match) for i, match in fits if match]
    numbers = tuple(map(int, match.groups()))
    return kind, numbers, SOLUTIONS[kind][1](*numbers)


def test_every_answer_is_what_the_question_asks_for(rows):
    for row in rows:
        assert row["answer"].split("\n")[-1] == f"#### {solve(row['question'])[2]}"


def test_every_number_of_a_question_is_used(rows):
    for row in rows:
        assert sorted(solve(row["question"])[1]) == sorted(map(int, re.findall(r"\d+", row["question"])))


def test_every_calculator_mark_is_right_and_repeats_what_stands_around_it(rows):
    for row in rows:
        found = CALCULATION.findall(row["answer"])
        assert len(found) == row["answer"].count("<<") > 0
        for terms, marked_terms, marked_result, result in found:
            assert (terms, result) == (marked_terms, marked_result)
            assert eval(terms) == int(result)  # digits and signs only, the pattern sees to it


def test_the_last_calculation_gives_the_answer(rows):
    for row in rows:
        assert CALCULATION.findall(row["answer"])[-1][-1] == row["answer"].split("#### ")[1]


def test_problems_take_one_to_three_steps_of_every_operation(rows):
    assert {row["answer"].count("<<") for row in rows} == {1, 2, 3}
    terms = "".join(terms for row in rows for terms, *_ in CALCULATION.findall(row["answer"]))
    assert set(re.findall(r"\D", terms)) == {"+", "-", "*"}


def test_most_solutions_with_steps_to_skip_skip_them_in_every_situation_alike(rows):
    for kind in range(3, len(SOLUTIONS)):  # the first three take one step
        counts = [row["answer"].count("<<") for row in rows if solve(row["question"])[0] == kind]
        assert 0.55 < counts.count(1) / len(counts) < 0.75
        assert set(counts) == ({1, 3} if kind == 7 else {1, 2})


def test_every_situation_comes_in_both_splits(splits):
    for some in splits.values():
        kinds = Counter(solve(row["question"])[0] for row in some)
        assert len(kinds) == len(SOLUTIONS) >= 6
        assert min(kinds.values()) >= 4  # there are only 16 products


def test_all_numbers_lie_between_0_and_40(rows):
    for row in rows:
        assert all(0 <= int(number) <= 40 for number in re.findall(r"\d+", row["question"] + row["answer"]))
        assert not re.search(r"-\s*-|=\s*-|#### -", row["answer"])


def test_a_split_has_its_size_and_no_question_twice(splits):
    for split, size in (("train", 4000), ("test", 250)):
        assert len({row["question"] for row in splits[split]}) == len(splits[split]) == size


@pytest.mark.parametrize("test_seed", [0, 1])
def test_the_splits_share_no_problem_even_with_other_names_and_things(splits, test_seed):
    train, test = (
        {solve(row["question"])[:2] for row in some} for some in (splits["train"], synthetic_rows("test", test_seed))
    )
    assert len(test) == 250  # no test problem comes twice under other names
    assert not train & test


def test_the_seed_alone_decides_the_rows(splits):
    assert synthetic_rows("train", seed=0) == splits["train"]
    assert synthetic_rows("train", seed=1) != splits["train"]
    assert synthetic_rows("test", seed=0) == splits["test"]
    assert synthetic_rows("test", seed=1) != splits["test"]


@pytest.mark.parametrize("split", ["validation", "", "TRAIN"])
def test_an_unknown_split_is_an_error_that_names_it(split):
    with pytest.raises(KeyError, match=f"'{split}'"):
        synthetic_rows(split, seed=0)


def test_a_target_earns_every_reward_in_full_save_for_solutions_of_one_step(rows):
    rewards = score(
        [format_target(parse_row(**row)) for row in rows], [row["answer"].split("#### ")[1] for row in rows]
    )
    for row, (formatting, reasoning, output_consistency, answer_accuracy) in zip(rows, rewards, strict=True):
        assert formatting == output_consistency == answer_accuracy == 1
        kind, _, _ = solve(row["question"])
        if row["answer"].count("<<") > 1:
            assert reasoning == 1
        elif kind >= 3:  # one calculation where there could be two or three
            assert reasoning == 0.5
        else:
            assert reasoning == 0.75  # one step, and statements
