"""Numbers in a text: which it holds, whether it is one, and whether the calculations written in it are right.

Nothing here knows what a completion is. Every function is defined for any text and takes time linear in its length.
"""

import ast
import operator
import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import cache, lru_cache
from itertools import compress, islice, pairwise, product, starmap
from typing import Any

Number = Decimal | Fraction
LETTER = r"[^\W\d_]"
LONGEST = 200  # characters of a calculation, or around an answer; what is longer is not judged

# The plain form that all of this file reads: ASCII digits, signs and spaces, "1/2" for any way to write a half.
NOT_ASCII = re.compile(r"[⁰¹²³⁴-⁹]{1,4}[⁄/][₀-₉]{1,4}|[^\x00-\x7f]")
ACCENTS = re.compile(rf"(?<={LETTER})[^\x00-\x7f\w\s]+")  # the signs after a letter, combining ones among them
ASCII = dict(zip("∕⁄٫٬٪−➖˗‘’′“”″", "//.,%---'''\"\"\"", strict=True)) | {"…": "..."}
KINDS = {"Sc": "$", "Pd": "-", "Zs": " ", "Cf": ""}  # categories: currency, dashes, spaces, what is not seen
EDGE = "\x1f"  # of a fraction: "2½" is two and a half, "½5" are two numbers
FRAC = r"\\(?:[dtc]|nice|s)?frac\s*"
PLAIN = {
    r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))|\{,\}|,\\!|(?<=\d)\\,(?=\d{3}(?!\d))": ",",
    r"\\[,;:! ]": " ",
    FRAC + r"(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))": rf"{EDGE}\1\2/\3\4{EDGE}",
}
COMMANDS = dict(left=" ", right=" ", displaystyle=" ", le="≤", leq="≤", ge="≥", geq="≥", ne="≠", neq="≠", approx="≈")
COMMANDS |= dict(pm="±", infty="∞", pi="π", times="×", cdot="·", div="÷", sqrt="√", circ="°", degree="°")
WRAPPED = re.compile(r"\\(?:text\w*|math(?:rm|bf|it|sf)|[mf]box|boxed) ?\{([^{}]*)\}")
DIVISION = re.compile(FRAC + r"\{([^{}]*)\} ?\{([^{}]*)\}")

# Fractions are kept short because `int` takes quadratic time, and refuses more than 4,300 digits; `Decimal` is linear.
FRACTION = r"\d{1,18}/\d{1,18}(?!\.?\d)"
MIXED = r"\d{1,18} [1-9]\d?/\d{1,3}(?!\.?\d)"
# Spaces group digits where no word follows ("12 200-kilobyte videos") or a group begins with 0, as no count does.
SPACED = rf"(?: \d{{3}}){{1,12}}(?!\d| ?-?{LETTER}| \d{{3}})|(?: 0\d\d)(?: \d{{3}})*(?!\d)"
DECIMAL = rf"(?:\d{{1,3}}(?:(?:,\d{{3}})+(?!\d)|{SPACED})|\d+)(?:\.\d+)?|\.\d+"
UNSIGNED = rf"(?:({MIXED})|({FRACTION})|((?:{DECIMAL})(?:[eE][+-]?\d{{1,3}}(?!\d))?))"
# A minus after a word, a number or a bracket is no sign but a difference or a range.
NUMBER = re.compile(r"(?=[-\d.]| -)((?:(?:^ ?|(?<=[=:(])|(?<=[=:(] ))- |(?<![\w)\]%])-(?! ))(?:[($]+ ?)?)?" + UNSIGNED)

# Answers: one spelling of what people and LaTeX write, and what may stand around a number that leaves it what it is.
SPELLING = {
    r"\\[()\[\]]|\*\*|`": " ",
    r"\\([$%#&])": r"\1",
    r"\^ *(?:\{ *° *\}|°)": "°",
    r"\bper ?cent\b": "%",
    r"\\\{": "⟦",
    r"\\\}": "⟧",
    r"([\^_√]) ?\{([^{}]*)\}": r"\1(\2)",
    r"(?<=[\^_√])(\d\d+)": r"(\1)",
    r"(?<=[\^_√/])\((\w)\)|\((\w)\)(?=/)": r"\1\2",
    r"[{}]|~(?=[a-z])": " ",
    r"(?<=\d) ?/ ?(?=\d)": "/",
}
SIGN = re.compile(
    r"(?:(?:^|(?<=[=:(])|(?<=[=:(] ))[-+] ?|(?<=[ $])[-+]|\b(?:[Mm]inus|[Nn]egative|moins|menos|минус) )"
    r"(?:[($] ?|[A-Z]{1,3}(?=\$)|(?:[A-Z]{3}|Rs\.?|kr\.?) )*$"
)
# "72 m^2" is 72 with its unit, "2xy" is not: what is as short as that is one of these, or a word after a space.
ONE = "[mgshlLWVJCF]"
UNITS = ONE + "|[kcmd]m|[mk]g|lbs?|oz|ft|in|yds?|mi|hrs?|min|m?sec|ms|[mk]ph|[mcd]l|sq|st|nd|rd|th|usd|USD|EUR"
POWER = re.compile(rf"(\d[^\d^=]{{0,30}}?(?:{LETTER}{{2}}|(?<!{LETTER})[ms]) ?)\^\(?-?[1-4]\)?(?!\d)")
SHORT = rf"(?!(?:{UNITS})\b| (?:{UNITS}|[A-Z]{{3}})\b| \w*[aeiouAEIOU]) ?[a-zA-Z]{{1,3}}(?![\w-])"
END = rf"(?!['.&-]?{LETTER})"
NAME = rf"(?!{LETTER}[-.&]{LETTER}{END}){LETTER}(?:{LETTER}|['.&-](?={LETTER}))+{END}"  # a word, and no "x-y"
NAMES = rf"{NAME}|(?![ーㅡ])(?={LETTER})[\u2e80-\ud7ff]{END}"
# Each character has one way to match, so that these take linear time.
BEFORE = re.compile(
    rf"(?:{NAMES}|[aAI](?= (?!=))|[a-zA-Z](?= ?=|: )|[A-Z](?=\$)|(?<!{LETTER})\(|!(?!=)|[\s.,:;?\"'#=≈)$¢%])*"
    r"(?<![,a-zA-Z])"
)
AFTER = re.compile(
    rf"(?!!|\.\.|{SHORT})(?: ?{ONE}{END})?(?:{NAMES}|(?:(?<=[/°])|(?<=° )){ONE}{END}|(?<= )a(?= )|(?<== )[a-zA-Z]{END}"
    rf"|-(?={LETTER}{{3}})|/(?={LETTER}{{3}}|(?<={LETTER}/)(?:{UNITS}){END})|(?<={LETTER}{{2}})!|\.(?!\.)"
    r"|[\s,:;?\"'=()$¢%°])*"
)
# Words that make another number of it, whose place is "#".
CHANGED = re.compile(
    r"\b(?:or|nor|not|than|neg|negative|minus|moins|menos|plus|least|most|below|above|point|tens|dozens?|hundred\w*|grand"
    r"|thousand\w*|mill?|mio|[mbt]r?illi(?:on|ard)\w*|lakhs?|crores?|hal(?:f|ves)|thirds?|quarters?|double|twice|triple"
    r"|(?:four|fif|six|seven|eigh|nin|ten)ths?|one (?:in|out)|divided|multiplied|roots?|sqrt|powers?|factorial|infinity"
    r"|mod|modulo|ln|log|sin|cos|tan|exp|pi)\b|n't\b|\b(?:under|over|up to|but|except|(?:opposite|reciprocal) of"
    r"|(?:square|cube) of|exceed\w*|times|squared?|cubed?|two|three|four|five|six|seven|eight|nine|ten"
    r"|\w+t(?:een|y))[ ($]*#|# ?(?:squared|cubed|over|[ap]\.? ?m\b|o'clock|and (?:a|up)\b|sin|cos|tan|log|ln|sqrt|pi)"
    r"|[\u0370-\u03ff]|[一二三四五六七八九十百千万萬億亿兆半点點时時分负負零两兩만억천백반]|[至超不或于]|以[上下]",
    re.IGNORECASE,
)


def plain_text(text: str) -> str:
    """Return a text with ASCII digits, signs and spaces, its fractions as "1/2", and LaTeX as people write it."""
    if text.isascii() and not re.search(rf"[\\{{{EDGE}]", text):
        return text
    text = ACCENTS.sub(lambda match: "".join(c for c in match[0] if unicodedata.category(c)[0] != "M"), text)
    text = NOT_ASCII.sub(lambda match: _plain_character(match[0]), _rewritten(text, PLAIN))
    text = re.sub(rf"(?<=[\d)]){EDGE}+(?=\d)", " ", text).replace(EDGE, "")
    text = re.sub(r"\\(sqrt|[a-zA-Z]+(?![a-zA-Z]| ?\{))", lambda match: COMMANDS.get(match[1], match[0]), text)
    for _ in range(4):  # as deep as anybody nests \\frac{}{} and \\text{}
        text = DIVISION.sub(r"(\1)/(\2)", WRAPPED.sub(r" \1 ", text))
    return text


def _rewritten(text: str, table: Mapping[str, str]) -> str:
    for pattern, replacement in table.items():
        text = re.sub(pattern, replacement, text, flags=re.IGNORECASE)
    return text


@cache
def _plain_character(character: str) -> str:
    """What stands for a character that is not ASCII, or for a fraction of small digits."""
    kind, form = unicodedata.category(character[0]), unicodedata.decomposition(character[0]).split(" ")[0]
    compatible = unicodedata.normalize("NFKC", character)
    if len(character) > 1 or form == "<fraction>":
        return EDGE + compatible.replace("⁄", "/") + EDGE
    if form == "<super>":
        return "^" + compatible
    if kind == "Nd":
        return str(unicodedata.decimal(character))
    if kind in KINDS and character not in "\u00ad¢〜〰":
        return KINDS[kind]
    return ASCII.get(character, compatible if form in ("<wide>", "<small>", "<font>") else character)


def numbers_in(text: str) -> list[Number]:
    """Return the numbers written in digits in a text, exact and in order.

    Read as one number: "1,080", "1 080", "-$5.50", ".5", "1e3", "1/2", "1 1/2", "1½" and `\\frac{1}{2}`. Read as two:
    "10-12", and "48/2", which is a division still to be done. Words, units, currency, percent signs and markup are
    skipped.
    """
    return [value for match in NUMBER.finditer(plain_text(text)) for value in _values(*match.groups(""))]


def _values(sign: str, mixed: str, fraction: str, decimal: str) -> list[Number]:
    sign = "-" if sign else ""
    if decimal:
        return [Decimal(sign + re.sub("[ ,]", "", decimal))]
    *whole, numerator, denominator = parts = [int(digits) for digits in re.findall(r"\d+", mixed or fraction)]
    if denominator and (numerator < denominator if whole else numerator % denominator):
        return [int(f"{sign}1") * (sum(whole) + Fraction(numerator, denominator))]
    return [Decimal(f"{sign}{parts[0]}"), *map(Decimal, parts[1:])]


def stated(text: str) -> frozenset[Number]:
    """Return what a text says: of the numbers after its last equals sign, or of all, the first and the last."""
    sides = map(numbers_in, reversed(EQUALS.split(plain_text(text))))
    numbers = next(filter(None, sides), [])
    return frozenset(numbers[:1] + numbers[-1:])


def parse_number(text: str) -> Number | None:
    """Return the number that a text is, or None if it is none, several, or anything that its digits alone do not say.

    Words, a unit ("72 m^2"), currency, percent, LaTeX and markup may stand around it. A root, a power, a factorial, a
    letter for a number, an interval, an inequality, a ratio, a time of day, a "dozen" or an "or" may not.
    """
    return (_read(text) or (None,))[0]


def is_bare_number(text: str) -> bool:
    """Tell whether a text is a number without words: as a truth it is compared by value, anything else is repeated."""
    read = _read(text)
    return read is not None and not any(map(str.isalpha, read[1]))


def _read(text: str) -> tuple[Number, str] | None:
    """Return the number that a text is, and what stands around it."""
    text = POWER.sub(r"\1", " ".join(_rewritten(plain_text(text), SPELLING).split()))
    found = list(islice(re.finditer(UNSIGNED, text), 2))
    if len(found) != 1 or len(text) - len(found[0][0]) > LONGEST:
        return None
    before, after = text[: found[0].start()], text[found[0].end() :]
    sign = SIGN.search(before)
    before = before[: sign.start()] if sign else before
    values = _values("-" if sign and "+" not in sign[0] else "", *found[0].groups(""))
    harmless = BEFORE.fullmatch(before) and AFTER.fullmatch(after) and not CHANGED.search(f"{before}#{after}")
    return (values[0], before + after) if harmless and len(values) == 1 else None


def same_answer(given: str, expected: str) -> bool:
    """Tell whether an answer says what is expected.

    Where a bare number is expected ("-1,080", "$5.00", "50%"), the answer must be one number, of the same value.
    Anything else ("Paris", "x+1", "5 stamps") must be repeated, apart from case, spaces, a full stop and how LaTeX
    spells it.
    """
    key = answer_key(given, expected)
    return key not in (None, "") and key == answer_key(expected, expected)


def answer_key(given: str, expected: str) -> Number | str | None:
    """What two answers to one problem have in common when they say the same; None or "" if they say nothing."""
    if is_bare_number(expected):
        return parse_number(given)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)|\$", "", _rewritten(plain_text(given), SPELLING).casefold()).rstrip(".")


def describe_texts(answers: Sequence[str]) -> str | None:
    """One line for the log on the final answers that are no bare numbers, None where there are none."""
    texts = [" ".join(answer.split()) for answer in answers if not is_bare_number(answer)]
    count = f"{len(texts)} of {len(answers)} final answers are no bare numbers"
    advice = "where the number alone is meant, cut it out with --answer_pattern"
    return f"{count}, such as '{texts[0][:40]}', and must be repeated word for word: {advice}" if texts else None


# How people and LaTeX write a calculation, and the plain form that is judged.
CLAUSE_END = re.compile(r"[.!?;:,]\s|\n|\\\]|\b(?:and|so|because)\b", re.IGNORECASE)
EQUALS = re.compile(r"=|≈|\bequals?(?: to)?\b")
NOTATION = {
    r"\*\*|\\[()\[\]]|\([^()\d]*\)": " ",  # bold, LaTeX's brackets, remarks
    r"\\?[$¢]": "",
    r"[×·⋅]|(?<![a-z])x(?= ?[(\d.])|\btimes(?= ?[(\d.])|(?:(?<=%)|(?<=/\d)|(?<=/\d\d)) of\b": "*",
    r"÷|\bdivided by\b": "/",
    r"\bplus\b": "+",
    r"\bminus\b": "-",
    rf"(?<=\d) (?=[1-9]\d\d[ -]{LETTER})": ";",  # 12 200-kilobyte videos
}
LONE_LETTER = re.compile(rf"(?<!{LETTER}|['’])(?!(?<= )a ){LETTER}(?!{LETTER})")  # an unknown; "a box" has none
SOLVED = re.compile(
    r"(?<![-+*/=] )(?<![-+*/=\w])([A-Za-z]) ?=(?:[^=]{0,60}=){0,3} ?\$?(-?[\d,]{0,9}\.?\d{1,9})(?!\.?\d| ?[-+*/])"
)
UNIT_WORD = rf"(?:[-/] ?)?{LETTER}(?:{LETTER}|['/.&-](?={LETTER}))*(?!{LETTER})(?:-(?=\d))?"  # "/day" and "-year-" too
UNIT = re.compile(rf"(?<=[\d)%])(?:\s*{UNIT_WORD})+\s*(?=[-+*/)]|$)")
BREAK = re.compile(rf"{UNIT_WORD}|[:;]")
PERCENT = re.compile(r"([\d.,]*\d) ?\\?%")
# In "72 + 0", "1 * 72", "72 / 1", "--72" and "(72)" what leaves 72.
NEUTRAL = re.compile(
    r"(?:[-+]+ ?0*\.?0+ ?%?|[*/] ?1(?:\.0+)?)(?! ?[\d*/%.,])|(?<![\d./])(?:0 ?\+|1 ?\*)|^--|\(([-\d.]+)\)"
)
FIRST_NUMBER = re.compile(rf"(?:- ?)?(?:{MIXED}|\d+/\d+|{DECIMAL})|")
ANY_NUMBER = re.compile(rf"(?P<mixed>{MIXED})|{FRACTION}|{DECIMAL}")
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATIONS |= {ast.USub: operator.neg}


def judge(clauses: Sequence[str]) -> list[tuple[bool | None, frozenset[Number]]]:
    """Tell of each clause of a text whether it calculates right, and the results.

    None where it does not calculate, cannot be judged, or changes nothing ("80 + 0 = 80"). A letter that has a value
    somewhere in the text ("x = 5") is put into the equations that hold it.
    """
    values = tuple(dict(pair for clause in clauses for pair in SOLVED.findall(clause)).items())
    return [_judge(clause, values) if EQUALS.search(clause) else (None, frozenset()) for clause in clauses]


@lru_cache(maxsize=1000)  # two rewards ask for the same
def _judge(clause: str, values: tuple[tuple[str, str], ...]) -> tuple[bool | None, frozenset[Number]]:
    solved = dict(values)
    text = POWER.sub(r"\1", _rewritten(clause, NOTATION))
    letters = LONE_LETTER.findall(text)
    text = LONE_LETTER.sub(lambda match: f" ({solved[match[0]]})" if match[0] in solved else match[0], text)
    if max(len(clause), len(text)) > LONGEST:
        return None, frozenset()
    pairs = list(pairwise(EQUALS.split(text)))
    verdicts = list(starmap(_equal, pairs))
    if False in verdicts:  # letters may stand for anything, percent and cents for hundredths or not
        return None if letters or re.search("%|¢|cent", clause) else False, frozenset()
    right = list(compress(pairs, verdicts))
    results = [n for a, b in right[-1:] if (n := numbers_in(b)[:1]) and _equal(a, str(n[0]) + "%" * ("%" in b))]
    if all(verdicts):
        results += [numbers_in(solved[letter]) for letter in letters if letter in solved]
    return any(not _changes_nothing(left) for left, _ in right) or None, frozenset().union(*results)


def _changes_nothing(side: str) -> bool:
    """Tell whether the calculation that ends one side of an equation is a number, but for zeros and factors of 1."""
    side = re.sub(r"(?<=[\d)]) *\(", "*(", BREAK.split(UNIT.sub(" ", side))[-1].strip())
    for _ in range(4):
        side = NEUTRAL.sub(r"\1", side).strip()
    return not re.search(r"[-+*/(]", side[1:])


def _equal(left: str, right: str) -> bool | None:
    """Tell whether the calculation that ends `left` has the value that begins `right`; None: there is nothing to tell.

    Either side may go on: "2*3=6*4=24" is read as people mean it. Results may be rounded to the decimals written.
    """
    left = BREAK.split(UNIT.sub(" ", left))[-1].strip()
    right = BREAK.split(UNIT.sub(" ", right))[0].strip()
    first = FIRST_NUMBER.match(right)[0]
    if not re.search(r"[-+*/(]", left[1:]):
        return None
    # The dash of "- 48/2 = 24" may be that of a list.
    values = {_evaluate(PERCENT.sub(r"(\1/100)", side)) for side in (left, left.removeprefix("- "))} - {None}
    readings = {PERCENT.sub(percent, side) for side in (right, first) for percent in (r"(\1/100)", r"\1")}
    stated = set(map(_evaluate, readings)) - {None}  # "5/8 = 62.5%" and "5/8*100 = 62.5%"
    if not values or not stated:
        return None
    decimals = len(first.partition(".")[2])
    error = min(abs(value - result) for value, result in product(values, stated)) * 10**decimals
    if error >= 1 and not (re.fullmatch(FRACTION, left) and max(values) < 1):  # "1/4 cup = 4 tablespoons"
        return False
    return error == 0 or (error < 1 and decimals > 0) or None


def _evaluate(expression: str) -> Fraction | None:
    """Return the exact value of numbers joined by + - * / and brackets; None for anything else."""
    numbers: list[Fraction] = []

    def name(match: re.Match[str]) -> str:
        digits = match[0]
        whole, part = digits.split(" ") if match.lastgroup else (0, digits)
        numbers.append(Fraction(int(digits)) if digits.isdecimal() else int(whole) + Fraction(re.sub("[ ,]", "", part)))
        return f" n{len(numbers) - 1} "

    def value(node: Any) -> Fraction:
        if isinstance(node, ast.Name):
            return numbers[int(node.id[1:])]
        operands = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
        return OPERATIONS[type(node.op)](*map(value, operands))

    try:
        named = re.sub(r"(?<=[\w)]) *\(", "*(", ANY_NUMBER.sub(name, expression)).strip()
        return value(ast.parse(named, mode="eval").body) if re.fullmatch(r"[n\d+*/() -]+", named) else None
    except (SyntaxError, KeyError, AttributeError, ZeroDivisionError):
        return None
