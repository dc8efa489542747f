"""Numbers in a text, and whether the calculations written in it are right.

Nothing here knows what a completion is. Every function is defined for any text and takes time linear in its length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

# Full-width characters, other minus signs and fractions, and the spaces that group digits.
PLAIN_CHARACTERS = (
    {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    | dict.fromkeys(map(ord, "\u2212\u2012\u2013\ufe63"), "-")
    | dict.fromkeys(map(ord, "\u00a0\u2009\u202f"), " ")
    | {ord("⁄"): "/", ord("½"): " 1/2", ord("¼"): " 1/4", ord("¾"): " 3/4", ord("⅓"): " 1/3", ord("⅔"): " 2/3"}
)
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
LATEX_DIVISION = re.compile(r"\\[dt]?frac ?\{([^{}]*)\} ?\{([^{}]*)\}")
LATEX_COMMA = re.compile(r"\{,\}|\\,|,\\!")
# Fractions are kept short because `int` takes quadratic time, and refuses more than 4,300 digits; `Decimal` is linear.
FRACTION = r"\d{1,18}/\d{1,18}(?!\.?\d)"
DECIMAL = r"(?:\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus after a word, a number or a bracket is no sign but a difference or a range.
SIGN = r"(?<![\w)\]%])(-)\\?[$€£¥]?"
NUMBER = re.compile(rf"(?:{SIGN})?(?:({FRACTION})|((?:{DECIMAL})(?:[eE][+-]?\d{{1,3}}(?!\d))?))")

CLAUSE_END = re.compile(r"[.!?;:,]\s|\n|\\\]|\b(?:and|so|because)\b", re.IGNORECASE)
EQUALS = re.compile(r"=|≈|\\approx|\bequals?(?: to)?\b")
LONGEST_CALCULATION = 200  # characters: what is longer is not judged, so that a text takes linear time

# How people and LaTeX write a calculation, and the plain form that is judged.
NOTATION = {
    r"\\(?:text|boxed|mathrm|mathbf) ?\{([^{}]*)\}": r" \1 ",
    r"\*\*|\\[()\[\]!;]|\([^()\d]*\)": " ",  # bold, LaTeX's brackets and spaces, remarks
    r"\\?[$€£¥¢]": "",
    r"[×·⋅]|\\times|\\cdot|(?<![a-z])x(?= ?[(\d.])|\btimes(?= ?[(\d.])|(?:(?<=%)|(?<=/\d)|(?<=/\d\d)) of\b": "*",
    r"÷|\\div|\bdivided by\b": "/",
    r"\bplus\b": "+",
    r"\bminus\b": "-",
    r"(?<![\d.,])(\d{1,3}) (\d\d?/\d\d?)(?!\d)": r"(\1+\2)",  # 1 1/2
}
LETTER = r"[^\W\d_]"
LONE_LETTER = re.compile(rf"(?<!{LETTER}|['’])(?!(?<= )a ){LETTER}(?!{LETTER})")  # an unknown; "a box" has none
SOLVED = re.compile(r"(?<![-+*/=] )(?<![-+*/=\w])([A-Za-z]) ?= ?\$?(-?[\d,]{0,9}\.?\d{1,9})(?!\.?\d)")
WORD = rf"(?:[-/] ?)?{LETTER}(?:{LETTER}|['’/.&-](?={LETTER}))*(?!{LETTER})(?:-(?=\d))?"  # "/day" and "-year-" too
UNIT = re.compile(rf"(?<=[\d)%])(?:\s*{WORD})+\s*(?=[-+*/)]|$)")
BREAK = re.compile(rf"{WORD}|[:;]")
PERCENT = re.compile(r"([\d.,]*\d) ?\\?%")
FIRST_NUMBER = re.compile(rf"- ?(?:{DECIMAL})|\d+/\d+|{DECIMAL}|")
TOKEN = re.compile(rf"({FRACTION}|{DECIMAL})|(\S)")


def numbers_in(text: str) -> list[Decimal | Fraction]:
    """Return the numbers written in digits in a text, exact and in order.

    Read as one number: "1,080", "1 080", "-$5.50", ".5", "1e3", "1/2" and `\\frac{1}{2}`. Read as two: "10-12", and
    "48/2", which is a division still to be done. Words, units, currency, percent signs and markup are skipped.
    """
    numbers: list[Decimal | Fraction] = []
    for sign, fraction, decimal in NUMBER.findall(plain_text(text)):
        numerator, _, denominator = fraction.partition("/")
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


def stated(text: str) -> frozenset[Decimal | Fraction]:
    """Return what a text says: of the numbers after its last equals sign, or of all, the first and the last."""
    sides = map(numbers_in, reversed(EQUALS.split(plain_text(text))))
    numbers = next(filter(None, sides), [])
    return frozenset(numbers[:1] + numbers[-1:])


def same_answer(given: str, expected: str) -> bool:
    """Tell whether an answer says what is expected.

    Where a bare number is expected ("-1,080", "$5.00", "50%"), the answer must hold exactly one number, of the same
    value. Anything else ("Paris", "x+1") must be repeated, apart from case, spaces and a full stop.
    """
    key = answer_key(given, expected)
    return key not in (None, "") and key == answer_key(expected, expected)


def answer_key(given: str, expected: str) -> Decimal | Fraction | str | None:
    """What two answers to one problem have in common when they say the same; None or "" if they say nothing."""
    return parse_number(given) if is_bare_number(expected) else _letters(given)


def plain_text(text: str) -> str:
    return LATEX_COMMA.sub(",", LATEX_FRACTION.sub(r"\1/\2", text.translate(PLAIN_CHARACTERS)))


def is_bare_number(text: str) -> bool:
    return parse_number(text) is not None and not any(map(str.isalpha, NUMBER.sub("", plain_text(text))))


def _letters(text: str) -> str:
    return "".join(text.casefold().split()).strip(".")


def judge(clauses: Sequence[str]) -> list[tuple[bool | None, frozenset[Decimal | Fraction]]]:
    """Tell of each clause of a text whether it calculates right, and what it finds.

    None where it does not calculate or cannot be judged. A calculation that changes nothing ("80 + 0 = 80") is none.
    A letter that has a value somewhere in the text ("x = 5") is put into the equations that hold it.
    """
    solved = {letter: value for clause in clauses for letter, value in SOLVED.findall(clause)}
    return [_judge(clause, solved) for clause in clauses]


def _judge(clause: str, solved: Mapping[str, str]) -> tuple[bool | None, frozenset[Decimal | Fraction]]:
    if len(clause) > LONGEST_CALCULATION or not EQUALS.search(clause):
        return None, frozenset()
    text = clause
    for pattern, plain in NOTATION.items():
        text = re.sub(pattern, plain, text, flags=re.IGNORECASE)
    while text != (text := LATEX_DIVISION.sub(r"(\1)/(\2)", text)):  # from the inside out
        pass
    letters = LONE_LETTER.findall(text)
    text = LONE_LETTER.sub(lambda match: f" ({solved[match[0]]})" if match[0] in solved else match[0], text)
    if len(text) > LONGEST_CALCULATION:
        return None, frozenset()
    sides = EQUALS.split(text)
    verdicts = [_equal(left, right) for left, right in pairwise(sides)]
    if False in verdicts:  # letters may stand for anything, percent and cents for hundredths or not
        return None if letters or re.search("%|¢|cent", clause) else False, frozenset()
    found = [numbers_in(side)[:1] for side, verdict in zip(sides[1:], verdicts, strict=True) if verdict][-1:]
    if all(verdicts):
        found += [numbers_in(solved[letter]) for letter in letters if letter in solved]
    return bool(found) or None, frozenset().union(*found)


def _equal(left: str, right: str) -> bool | None:
    """Tell whether the calculation that ends `left` has the value that begins `right`; None: there is nothing to tell.

    Either side may go on: "2*3=6*4=24" is read as people mean it. Results may be rounded to the decimals written.
    """
    left = BREAK.split(UNIT.sub(" ", left))[-1].strip()
    right = BREAK.split(UNIT.sub(" ", right))[0].strip()
    first = FIRST_NUMBER.match(right)[0]
    if not re.search(r"[-+*/(]", left[1:]):
        return None
    given = _evaluate(PERCENT.sub(r"(\1/100)", left))
    readings = {PERCENT.sub(percent, side) for side in (right, first) for percent in (r"(\1/100)", r"\1")}
    stated = set(map(_evaluate, readings)) - {None}  # "5/8 = 62.5%" and "5/8*100 = 62.5%"
    if given is None or not stated:
        return None
    decimals = len(first.partition(".")[2])
    error = min(abs(given - value) for value in stated) * 10**decimals
    if error >= 1 and not (re.fullmatch(FRACTION, left) and given < 1):  # "1/4 cup = 4 tablespoons"
        return False
    if set(numbers_in(left.replace("/", " / "))) - {0, 1} == {given}:  # "80 + 0 = 80"
        return None
    return error == 0 or (error < 1 and decimals > 0) or None


def _evaluate(expression: str) -> int | Fraction | None:
    """Return the exact value of numbers joined by + - * / and brackets; None for anything else."""
    outer, total, term, operator, wants_number = [], 0, 1, "*", True
    try:
        for number, symbol in TOKEN.findall(expression):
            if symbol == "(":  # after a number it multiplies
                outer.append((total, term, operator if wants_number else "*"))
                total, term, operator, wants_number = 0, 1, "*", True
            elif (number and wants_number) or (symbol == ")" and outer and not wants_number):
                if number:
                    value = int(number) if number.isdecimal() else Fraction(re.sub("[ ,]", "", number))
                else:
                    value = total + term
                    total, term, operator = outer.pop()
                term = Fraction(term) / value if operator == "/" else term * value
                wants_number = False
            elif symbol in ("+", "-") and not wants_number:
                total, term, operator, wants_number = total + term, int(symbol + "1"), "*", True
            elif symbol in ("*", "/") and not wants_number:
                operator, wants_number = symbol, True
            elif symbol == "-":
                term = -term
            else:
                return None
    except ZeroDivisionError:
        return None
    return None if wants_number or outer else total + term
