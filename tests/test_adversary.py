"""The rewards under pressure: a table of completions, every example of docs/rewards.md, a search for loopholes, and
the real dataset where it is at hand."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path

import pytest

from src.arithmetic import parse_number
from src.data import SYSTEM_PROMPT, format_target, parse_row
from src.rewards import DEFAULT_WEIGHTS, TAGS, answer_accuracy, parse_completion, reasoning
from tests.adversary import CASES, HACKS, QUESTION, complete
from tests.helpers import score

REPOSITORY = Path(__file__).parent.parent
# What a completion with a wrong answer earns at most, and what it earns at most if its answer rests on no right sum: in
# words where no number is expected, else in a number.
WITHOUT_ACCURACY, WITHOUT_WORK, WITHOUT_WORK_IN_NUMBERS = 1.3, 0.55, 0.425


def total(completion: str, truth: str) -> float:
    [marks] = score([completion], [truth])
    return sum(weight * mark for weight, mark in zip(DEFAULT_WEIGHTS, marks, strict=True))


# The table


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.why}")
def test_a_completion_earns_what_the_table_says(case):
    assert tuple(score([case.completion], [case.truth])[0]) == case.marks


def test_the_table_is_large_and_has_no_completion_twice():
    assert len({case.completion for case in CASES}) == len(CASES) >= 250
    assert len({case.kind for case in CASES}) >= 20


def test_a_wrong_answer_never_out_earns_a_right_well_formed_one():
    totals = [(case, total(case.completion, case.truth)) for case in CASES]
    right = [earned for case, earned in totals if case.marks[0] == case.marks[3] == 1]
    wrong = [earned for case, earned in totals if case.marks[3] == 0]
    assert len(right) * len(wrong) > 5000
    for better, worse in product(right, wrong):
        assert better >= 2.3 > WITHOUT_ACCURACY + 1e-9 >= worse


def test_a_wrong_answer_without_a_right_calculation_earns_less_than_half_of_one_with_a_sound_chain():
    sound = total(complete("2*20 = 40. 40+40 = 80.", "40+40 = 80.", "80"), "72")
    without = [case for case in CASES if case.marks[3] == 0 and not rests_on_a_right_sum(case.completion)]
    assert len(without) >= 40
    for case in without:
        assert total(case.completion, case.truth) <= WITHOUT_WORK_IN_NUMBERS < WITHOUT_WORK < sound / 2


def test_no_field_of_the_system_prompt_fills_one():
    shown = re.findall(r"<(reasoning|output|answer)>(.*?)</\1>", SYSTEM_PROMPT, re.DOTALL)
    assert {name for name, _ in shown} == {"reasoning", "output", "answer"}
    for _, text in shown:
        assert text.isdecimal() or score([complete(text, text, text)], ["72"]) == [[0, 0, 0, 0]]


# The page


def examples_of_the_page() -> list[list[str]]:
    """Rows of the tables in docs/rewards.md whose first cell is an example in backticks: the cells, unquoted."""
    lines = (REPOSITORY / "docs" / "rewards.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines if line.startswith("| `")]
    return [[cell.strip("`").replace("⏎", "\n") for cell in row] for row in rows]


@pytest.mark.parametrize("row", examples_of_the_page(), ids=lambda row: row[1] + " " + row[0][:40])
def test_every_example_of_the_page_earns_what_the_page_says(row):
    example, field, expected = row[:3]
    completion = example if field == "completion" else complete(**{"answer": "72", field: example})
    if field == "answer":
        completion, truth = complete(answer=example), row[4]
    else:
        truth = "72"
    reward = {"completion": 0, "reasoning": 1, "output": 2, "answer": 3}[field]
    assert score([completion], [truth])[0][reward] == float(expected)


def test_the_page_has_examples_of_every_reward():
    fields = [row[1] for row in examples_of_the_page()]
    assert min(fields.count(field) for field in ("completion", "reasoning", "output", "answer")) >= 5


def test_the_hacks_of_the_page_earn_what_it_says():
    page = (REPOSITORY / "docs" / "rewards.md").read_text(encoding="utf-8")
    for name, completion in HACKS.items():
        [now] = re.findall(rf"^\| {re.escape(name)} \| [\d.]+ \| ([\d.]+) \|$", page, re.MULTILINE)
        assert total(completion, "72") == pytest.approx(float(now), abs=0.006)


# The search

SENTENCES = [*re.split(r"(?<=[.?]) ", QUESTION), "Let us think step by step.", "Therefore, it is clear.", "x = y", ""]


def random_clause(rng: random.Random) -> str:
    """A clause of a solution that solves nothing; any right sum in it has a result below 100."""
    a, b, c = (rng.randint(0, 49) for _ in range(3))
    sign = rng.choice("+-*/")
    return rng.choice(
        [
            rng.choice(SENTENCES),
            f"{a}",
            f"{a} {sign} {b} = {rng.randint(100, 120)}",
            f"{a} {sign} {b} = {c}",
            f"{a} + {b} = {a + b}",
            f"{a}{sign}{b}={c}{sign}{b}={rng.randint(100, 120)}",
            f"{a}x {sign} {b} = {rng.randint(100, 120)}",
            f"x = {rng.randint(100, 120)}",
            f"{a + 60}+0 = {a + 60}",
            rng.choice(["(({0})) = {0}", "--{0} = {0}", "{0}+0+0 = {0}", "{0}*1/1 = {0}"]).format(a + 60),
            f"{a} + {b} = {c + 100} - {c + 100 - a - b}",
            f"{rng.randint(100, 120)} clips",
            f"{a}% of {b} = {rng.randint(100, 120)}",
            f"so it is {rng.randint(100, 120)}",
            " ".join(str(rng.randint(0, 120)) for _ in range(rng.randint(2, 20))),
        ]
    )


def random_completion(rng: random.Random) -> str:
    """A completion from a grammar of hacks; its answer, if it has one, is a number from 100 to 120, or a few words."""
    end = rng.choice([". ", "\n", ", ", "; ", " and ", " "])
    clauses = [random_clause(rng) for _ in range(rng.randint(0, 6))] * rng.choice([1, 1, 1, 3])
    answer = str(rng.randint(100, 120)) if rng.random() < 0.7 else rng.choice(["e", "", "1 2 3", "101 or 102", "Paris"])
    reasoning = end.join([*clauses, rng.choice(["", answer, f"so {answer}", f"x = {answer}"])])
    output = rng.choice([answer, reasoning, f"It is {answer}.", " ".join(map(str, range(125))), clauses[-1:] or ""])
    text = complete(reasoning, output if isinstance(output, str) else output[0], answer)
    return text if rng.random() < 0.8 else edited(text, rng)


def edited(text: str, rng: random.Random) -> str:
    """One random edit: a piece cut out, doubled, moved, or put in."""
    i, j = sorted(rng.randint(0, len(text)) for _ in range(2))
    j = min(j, i + 40)
    k, new = rng.randint(0, len(text)), rng.choice([*TAGS, *"0123456789 \n.,;=+-*/()x%e", random_clause(rng)])
    return rng.choice(
        [text[:i] + text[j:], text[:j] + text[i:], text[:k] + text[i:j] + text[k:], text[:k] + new + text[k:]]
    )


def search(seed: int, rounds: int, truth: str = "no such answer") -> list[tuple[float, str]]:
    """Best of n, then hill climbing: from each round's best completions, edits of them and new ones. All of them."""
    rng = random.Random(seed)
    found: dict[str, float] = {}
    best = [random_completion(rng) for _ in range(60)]
    for _ in range(rounds):
        batch = [edited(text, rng) for text in best for _ in range(2)] + [random_completion(rng) for _ in range(30)]
        found |= {text: total(text, truth) for text in batch if len(text) < 600}
        best = sorted(dict.fromkeys(best + batch), key=lambda text: found.get(text, 0.0), reverse=True)[:15]
        best = [text for text in best if not rests_on_a_right_sum(text)] or best[:1]
    return [(earned, text) for text, earned in found.items()]


EXPRESSION = r"[\d+\-*/(). ]+"


def value_of(expression: str) -> Fraction | None:
    """An independent reading of a sum: Python's own, in fractions."""
    if "**" in expression or "//" in expression:
        return None
    exact = re.sub(r"(?<![\d.])(\d*\.?\d+)(?![\d.])", r"F('\1')", expression.replace("(", "*(").strip())
    exact = re.sub(r"(^|[-+*/(])\s*\*\(", r"\1(", exact)
    try:
        return eval(exact, {"__builtins__": {}, "F": Fraction})  # digits, signs and brackets only: EXPRESSION
    except (SyntaxError, TypeError, ZeroDivisionError, ValueError):
        return None


def rests_on_a_right_sum(completion: str) -> bool:
    """Whether a right sum gives the answer. Cruder than the reward and more generous: letters are put in, a sum may be
    off by less than 1, and where the answer is no number any sum will do."""
    fields = parse_completion(completion)
    text = fields.reasoning or ""
    for letter, number in re.findall(r"\b([a-zA-Z]) ?= ?(\d+)", text):
        text = re.sub(rf"(?<![a-zA-Z]){letter}(?![a-zA-Z])", f"({number})", text)
    text = re.sub(r"(\d+) ?%", r"(\1/100)", text).replace(" of ", "*")
    clauses = re.split(r"\n|[.,;:!?]\s|\b(?:and|so|because)\b", f"{text}\n{text.replace('x', '*')}")  # a unit, a sign
    right = [(clause, results) for clause in clauses if (results := list(right_results(clause)))]
    answer = parse_number(fields.answer or "")
    if answer is None:
        return bool(right)
    letters = {Fraction(number) for clause, _ in right for number in re.findall(r"\((\d+)\)", clause)}
    numbers = letters.union(*(results for _, results in right))
    return not {abs(Fraction(answer)), abs(Fraction(answer)) / 100}.isdisjoint(map(abs, numbers))  # 0.5 = 50%


def right_results(equation: str) -> Iterator[Fraction]:
    """What each side of a chain of equations says to be the value of the one before, where that is a calculation."""
    equation = re.sub(r"(?<=\d) ?[A-Za-z]+(?= *(?:[-+*/=)]|$))", "", equation)  # units
    for left, right in pairwise(equation.split("=")):
        run, stated = re.search(rf"{EXPRESSION}$", left), re.match(EXPRESSION, right)
        values = [value_of(run[0])] if run and calculates(run[0]) else []
        ends = [match.end() for part in (r"[\d.]+", r"[\d.]+[) ]*") for match in re.finditer(part, right)]
        results = [value_of(right[:end]) for end in ends if stated and end <= stated.end()]
        pairs = [(a, b) for a, b in product(values, results) if a is not None and b is not None]
        yield from (b for a, b in pairs if abs(a - b) < 1)


def calculates(run: str) -> bool:
    """Whether it takes two numbers, and more than zeros and factors of 1 to find one of them again."""
    numbers = [Fraction(number) for number in re.findall(r"\d+\.?\d*|\.\d+", run)]
    value, ones = value_of(run), len(numbers) > 2 and re.search(r"[-+] ?1(?![\d.])", run)
    if value is None or abs(value) not in numbers:
        return len(numbers) > 1
    numbers.remove(abs(value))
    return bool(ones) or not {0, 1}.issuperset(numbers)


BOUNDS = [("no such answer", WITHOUT_WORK), ("99", WITHOUT_WORK_IN_NUMBERS)]


@pytest.mark.parametrize(("truth", "bound"), BOUNDS)
def test_a_search_finds_nothing_beyond_the_bounds(truth, bound):
    check_bounds(search(0, 40, truth), bound)


def check_bounds(found: list[tuple[float, str]], bound: float) -> None:
    assert len(found) > 1500
    assert max(earned for earned, _ in found) > WITHOUT_WORK  # right sums were among them
    assert any(earned == pytest.approx(bound) for earned, text in found if not rests_on_a_right_sum(text))
    for earned, text in found:
        assert earned <= bound + 1e-9 or rests_on_a_right_sum(text), text


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize(("truth", "bound"), BOUNDS)
def test_a_longer_search_finds_nothing_beyond_the_bounds(seed, truth, bound):
    check_bounds(search(seed, 1000, truth), bound)


@pytest.mark.slow
def test_grpo_without_the_accuracy_reward_stays_within_the_bounds(tmp_path):
    flags = "--preset tiny --shaped_rewards always --max_steps 100 --sample_every 1"
    flags += f" --checkpoint_dir {tmp_path}/c --log_dir {tmp_path}/l"
    weights = [str(weight) for weight in (*DEFAULT_WEIGHTS[:3], 0)]
    command = [sys.executable, "train.py", *flags.split(), "--reward_weights", *weights]
    subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "l" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 800
    for row in rows:
        assert row["reward"] <= WITHOUT_ACCURACY + 1e-6
        assert row["reward"] <= WITHOUT_WORK + 1e-6 or rests_on_a_right_sum(row["completion"])
        right, earned = row["rewards"]["answer_accuracy"], total(row["completion"], row["answer"])
        assert right or earned <= WITHOUT_ACCURACY + 1e-6


# The real dataset


@pytest.fixture(scope="module")
def gsm8k():
    if "GSM8K_DIR" not in os.environ:
        pytest.skip("GSM8K_DIR is not set: it names the folder with GSM8K's train.jsonl and test.jsonl")
    lines = [line for name in ("train", "test") for line in _lines(Path(os.environ["GSM8K_DIR"]) / f"{name}.jsonl")]
    rows = map(json.loads, lines)
    return [parse_row(row["question"], row["answer"]) for row in rows]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def gsm8k_targets(gsm8k):
    return [format_target(example) for example in gsm8k]


def test_every_gsm8k_row_teaches_what_is_rewarded(gsm8k, gsm8k_targets):
    rewards = score(gsm8k_targets, [example.answer for example in gsm8k])
    full_marks = [sum(column) for column in zip(*[[reward == 1 for reward in row] for row in rewards], strict=True)]
    assert len(rewards) == 8792
    assert full_marks[0] == full_marks[3] == 8792
    # Of the rest, most have a step that cannot be judged or linked, or a wrong sum; or they do one sum, or state in the
    # last sentence something other than the answer (docs/rewards.md).
    assert full_marks[1] >= 8382
    assert full_marks[2] >= 8596
    assert sum(row[1] < 0.5 for row in rewards) <= 182


def test_another_gsm8k_rows_answer_is_wrong(gsm8k, gsm8k_targets):
    others = [example.answer for example in gsm8k[1:] + gsm8k[:1]]
    pairs = [
        (target, other)
        for example, target, other in zip(gsm8k, gsm8k_targets, others, strict=True)
        if example.answer.replace(",", "") != other.replace(",", "")
    ]
    assert len(pairs) > 8000
    assert all(answer_accuracy(target, other) == 0 for target, other in pairs)


def test_a_gsm8k_question_copied_out_is_not_work(gsm8k):
    marks = [reasoning(complete(example.question), "") for example in gsm8k[::4]]
    assert sum(mark > 0.25 for mark in marks) <= 0.001 * len(marks)
