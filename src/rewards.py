"""The four rewards of a completion: form, work shown, agreement with itself, and the right answer.

Each is a pure function `(completion, answer) -> float` in [0, 1], defined for any text and linear in its length. It
reads the completion alone: a prompt that spells the format out would satisfy every search for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

TAGS = ["<reasoning>", "</reasoning>", "<output>", "</output>", "<answer>", "</answer>"]
TAG = re.compile("|".join(TAGS))

# Full-width characters, other minus signs and fractions, and the spaces that group digits.
PLAIN_CHARACTERS = (
    {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    | dict.fromkeys(map(ord, "\u2212\u2012\u2013\ufe63"), "-")
    | dict.fromkeys(map(ord, "\u00a0\u2009\u202f"), " ")
    | {ord("⁄"): "/", ord("½"): " 1/2", ord("¼"): " 1/4", ord("¾"): " 3/4", ord("⅓"): " 1/3", ord("⅔"): " 2/3"}
)
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
LATEX_COMMA = re.compile(r"\{,\}|\\,|,\\!")
# A minus after a word, a number or a bracket is no sign but a difference or a range. Fractions are kept short because
# `int` takes quadratic time, and refuses more than 4,300 digits; `Decimal` is linear.
NUMBER = re.compile(
    r"(?:(?<![\w)\]%])(?P<sign>-)\\?[$€£¥]?)?"
    r"(?:(?P<numerator>\d{1,18})/(?P<denominator>\d{1,18})(?!\.?\d)"
    r"|(?P<decimal>(?:(?:\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?))"
)

CLAUSE_END = re.compile(r"[.!?;:,]\s|\n|\b(?:and|so|because)\b")
EQUALS = re.compile(r"=|\bequals?\b")
OPERATION = re.compile(r"[-−–+*/×÷^(]|(?<![a-z])x(?![a-z])|\b(?:plus|minus|times|divided)\b", re.IGNORECASE)


class Fields(NamedTuple):
    """The text of each field, None where its tags are missing, repeated or closed before they open."""

    reasoning: str | None
    output: str | None
    answer: str | None


def parse_completion(completion: str) -> Fields:
    """Return the three fields of a completion, whatever their order and whatever stands around them."""
    return Fields(
        *(_field(completion, opening, closing) for opening, closing in zip(TAGS[::2], TAGS[1::2], strict=True))
    )


def _field(completion: str, opening: str, closing: str) -> str | None:
    if completion.count(opening) != 1 or completion.count(closing) != 1:
        return None
    start, end = completion.index(opening) + len(opening), completion.index(closing)
    return completion[start:end] if start <= end else None


def numbers_in(text: str) -> list[Decimal | Fraction]:
    """Return the numbers written in digits in a text, exact and in order.

    Read as one number: "1,080", "1 080", "-$5.50", ".5", "1e3", "1/2" and `\\frac{1}{2}`. Read as two: "10-12", and
    "48/2", which is a division still to be done. Words, units, currency, percent signs and markup are skipped.
    """
    numbers: list[Decimal | Fraction] = []
    for sign, numerator, denominator, decimal in NUMBER.findall(_plain(text)):
        if decimal:
            numbers.append(Decimal(sign + decimal.replace(",", "").replace(" ", "")))
        elif int(denominator) and int(numerator) % int(denominator):
            numbers.append(Fraction(int(sign + numerator), int(denominator)))
        else:
            numbers += [Decimal(sign + numerator), Decimal(denominator)]
    return numbers


def parse_number(text: str) -> Decimal | Fraction | None:
    """Return the number in a text, or None if it holds none or several: two numbers are not an answer."""
    numbers = numbers_in(text)
    return numbers[0] if len(numbers) == 1 else None


def same_answer(given: str, expected: str) -> bool:
    """Tell whether an answer says what is expected.

    Where a bare number is expected ("-1,080", "$5.00", "50%"), the answer must hold exactly one number, of the same
    value. Anything else ("Paris", "x+1") must be repeated, apart from case, spaces and a full stop.
    """
    key = answer_key(given, expected)
    return key not in (None, "") and key == answer_key(expected, expected)


def answer_key(given: str, expected: str) -> Decimal | Fraction | str | None:
    """What two answers to one problem have in common when they say the same; None or "" if they say nothing."""
    return parse_number(given) if _is_bare_number(expected) else _letters(given)


def _plain(text: str) -> str:
    return LATEX_COMMA.sub(",", LATEX_FRACTION.sub(r"\1/\2", text.translate(PLAIN_CHARACTERS)))


def _is_bare_number(text: str) -> bool:
    return parse_number(text) is not None and not any(map(str.isalpha, NUMBER.sub("", _plain(text))))


def _letters(text: str) -> str:
    return "".join(text.casefold().split()).strip(".")


def formatting(completion: str, answer: str) -> float:
    """Reward `<reasoning>..</reasoning> <output>..</output> <answer>..</answer>` and nothing else.

    A fifth for each field that is opened once, closed once and not empty. Where all three are: a fifth for their order,
    and the last if there is also nothing but white space around them.
    """
    filled = sum(bool(field and field.strip()) for field in parse_completion(completion))
    in_order = filled == 3 and TAG.findall(completion) == TAGS
    alone = in_order and not "".join(TAG.split(completion)[::2]).strip()
    return (filled + in_order + alone) / 5


def reasoning(completion: str, answer: str) -> float:
    """Reward the work shown in the reasoning field, up to what the shortest worked solutions show.

    Half a mark for each calculation, a clause with an operation and numbers on both sides of an equals sign
    ("3 + 4 = 7"). A quarter for each other clause with numbers, at most half in all: a question copied out earns half.
    Clauses with the same numbers count once, clauses without count nothing. Whether the sums are right is left to
    `answer_accuracy`.
    """
    calculations, facts = set(), set()
    for clause in set(CLAUSE_END.split(parse_completion(completion).reasoning or "")):
        if numbers := tuple(numbers_in(clause)):
            (calculations if _calculates(clause) else facts).add(numbers)
    return min(1.0, len(calculations) / 2 + min(2, len(facts)) / 4)


def _calculates(clause: str) -> bool:
    sides_with_numbers = sum(any(map(str.isdigit, side)) for side in EQUALS.split(clause))
    return sides_with_numbers > 1 and OPERATION.search(clause) is not None


def output_consistency(completion: str, answer: str) -> float:
    """Reward an output that says what the reasoning concludes and what the answer says, right or wrong.

    Half a mark if the output is the end of the reasoning, or holds its last number; half if it holds the answer's
    number, or its text where the answer is not a number. Nothing if a field is missing or empty.
    """
    fields = parse_completion(completion)
    if not all(field and _letters(field) for field in fields):
        return 0.0
    output, stated = _letters(fields.output), numbers_in(fields.output)
    last_number = numbers_in(fields.reasoning)[-1:]  # empty where there is none
    concludes = _letters(fields.reasoning).endswith(output) or any(number in stated for number in last_number)
    number = parse_number(fields.answer)
    agrees = _letters(fields.answer) in output if number is None else number in stated
    return (concludes + agrees) / 2


def answer_accuracy(completion: str, answer: str) -> float:
    """Reward the right answer: 1 if the answer field, of which there is exactly one, says what `answer` says."""
    given = parse_completion(completion).answer
    return float(given is not None and same_answer(given, answer))


REWARD_FUNCTIONS = (formatting, reasoning, output_consistency, answer_accuracy)
DEFAULT_WEIGHTS = (0.3, 0.5, 0.5, 2.0)


def score(completions: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
    """Return every reward of every completion, unweighted: shape (B, 4), columns as in `REWARD_FUNCTIONS`.

    Raises:
        ValueError: there are not as many answers as completions.
    """
    return [
        [reward(completion, answer) for reward in REWARD_FUNCTIONS]
        for completion, answer in zip(completions, answers, strict=True)
    ]
