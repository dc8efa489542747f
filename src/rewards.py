"""The four rewards of a completion: form, work shown, agreement with itself, and the right answer.

Each is a pure function `(completion, answer) -> float` in [0, 1], defined for any text and linear in its length. It
reads the completion alone: a prompt that spells the format out would satisfy every search for it.
"""

import re
from typing import NamedTuple

from src.arithmetic import CLAUSE_END, is_bare_number, judge, numbers_in, parse_number, plain_text, same_answer, stated

TAGS = ["<reasoning>", "</reasoning>", "<output>", "</output>", "<answer>", "</answer>"]
TAG = re.compile("|".join(TAGS))
WORD_BEGINS = re.compile(r"(?<![\\a-zA-Z])[^\W\d_]{2}")  # \frac is none
# What stands in the form and in the example of the system prompts, clause by clause: copied out, it says nothing.
PROMPT_CLAUSES = """the steps; one calculation a line; the last step once more; the result as just the number;
    without words or units; The school has 6 * 20 = 120 pens; The classes get 4 * 15 = 60 pens;
    There are 120 - 60 = 60 pens for the teachers; Each teacher gets 60 / 12 = 5 pens;
    your steps; one sentence that states the result"""


class Fields(NamedTuple):
    """The text of each field, None where its tags are missing, repeated or closed before they open."""

    reasoning: str | None
    output: str | None
    answer: str | None


def parse_completion(completion: str) -> Fields:
    """Return the three fields of a completion, whatever their order and whatever stands around them."""
    return Fields(*(_field(completion, *tags) for tags in zip(TAGS[::2], TAGS[1::2], strict=True)))


def _field(completion: str, opening: str, closing: str) -> str | None:
    if completion.count(opening) != 1 or completion.count(closing) != 1:
        return None
    start, end = completion.index(opening) + len(opening), completion.index(closing)
    return completion[start:end] if start <= end else None


def clauses_of(field: str | None) -> list[str]:
    """The clauses of a field that say something: [] where it is unfilled. The system prompt's own say nothing.

    A clause ends with a line or a LaTeX formula, at punctuation before a space, and at "and", "so", "because".
    """
    clauses = CLAUSE_END.split(plain_text(field or ""))
    return [clause for clause in clauses if _letters_and_digits(clause) not in COPIED]


def _letters_and_digits(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


COPIED = {"", *map(_letters_and_digits, PROMPT_CLAUSES.split(";"))}


def formatting(completion: str, answer: str) -> float:
    """Reward `<reasoning>..</reasoning> <output>..</output> <answer>..</answer>` and nothing else.

    A fifth for each field that is opened once, closed once and filled: it holds a letter or a digit, and more than what
    the system prompt writes there. Where all three are: a fifth for their order, and the last if there is also nothing
    but white space around them.
    """
    filled = sum(bool(clauses_of(field)) for field in parse_completion(completion))
    in_order = filled == 3 and TAG.findall(completion) == TAGS
    alone = in_order and not "".join(TAG.split(completion)[::2]).strip()
    return (filled + in_order + alone) / 5


def reasoning(completion: str, answer: str) -> float:
    """Reward the work shown in the reasoning field.

    Half a mark for each step: a calculation that is right ("3 + 4 = 7") and that the completion's own answer rests on,
    which it finds, or which a later step uses. Steps with the same result count once. Without a number in the answer
    field, the last right calculation stands for it. A quarter, once, for a statement: words with a number, or a right
    calculation that leads nowhere. Digits alone and wrong calculations earn nothing.
    """
    fields = parse_completion(completion)
    clauses = clauses_of(fields.reasoning)
    wanted = {parse_number(fields.answer or "")} - {None}
    steps, states = set(), False
    for clause, (right, found) in reversed(list(zip(clauses, judge(clauses), strict=True))):
        numbers = found.union(numbers_in(clause), numbers_in(clause.replace("/", " / ")) if "/" in clause else ())
        leads = bool(found and (not wanted or wanted & found))
        wanted |= numbers if leads else set()
        if leads and right:
            steps.add(found)
        elif right or (right is None and numbers and WORD_BEGINS.search(clause)):
            states = True
    return min(1.0, len(steps) / 2 + states / 4)


def output_consistency(completion: str, answer: str) -> float:
    """Reward one result, right or wrong, that the reasoning finds, the output says and the answer gives.

    1 if a right calculation of the reasoning finds the answer's number, if the reasoning ends with that (its last
    calculation finds it, or its last clause with a number says it), and if the output says it without a wrong
    calculation. What a text says is the first or the last number after its last equals sign. Words cannot be checked
    like that: where no number is expected, a quarter if the reasoning's last clause and the output hold the answer's.
    """
    fields = parse_completion(completion)
    clauses, output, given = map(clauses_of, fields)
    if not (clauses and output and given):
        return 0.0
    number = parse_number(fields.answer)
    if number is None:
        words = _folded(fields.answer)
        agrees = words in _folded(clauses[-1]) and words in _folded(fields.output) and len(clauses) > 1
        return agrees / 4 if not is_bare_number(answer) else 0.0
    results = [found for right, found in judge(clauses) if right is not None]
    ends = next(filter(None, map(stated, reversed(clauses))), frozenset()).union(*results[-1:])
    sums_hold = all(right is not False for right, _ in judge(output))
    return float(sums_hold and number in ends.intersection(stated(fields.output), frozenset().union(*results)))


def _folded(text: str) -> str:
    """The words of a text, each between spaces, in small letters."""
    words = " ".join(re.findall(r"\w+|\S", text.casefold()))
    return f" {words.strip(' .')} "


def answer_accuracy(completion: str, answer: str) -> float:
    """Reward the right answer: 1 if the answer field, of which there is exactly one, says what `answer` says."""
    given = parse_completion(completion).answer
    return float(given is not None and same_answer(given, answer))


REWARD_FUNCTIONS = (formatting, reasoning, output_consistency, answer_accuracy)
DEFAULT_WEIGHTS = (0.3, 0.5, 0.5, 2.0)

OPERATOR = r"[+*×·÷]|[-/](?![^\W\d_])|(?<![^\W\d_])x(?![^\W\d_])|\\(?:times|cdot|div)|\b(?:plus|minus|times|divided)\b"
OPERATION = re.compile(rf"\d(?:(?!{OPERATOR})\D)*(?:{OPERATOR}|\}}\s*\{{)\D*\d", re.IGNORECASE)


def has_calculation(completion: str) -> bool:
    """Tell whether the reasoning field calculates, right or wrong: numbers, an operation, an equals sign after them."""
    lines = (parse_completion(completion).reasoning or "").splitlines()
    return any(OPERATION.search(side) for line in lines for side in line.split("=")[:-1])
