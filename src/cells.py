"""From the cells of a row to the texts of a problem: what is asked, and where in an answer the final one stands."""

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import zip_longest
from typing import Any

from src.errors import UserError

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\[{}]|[{}]")
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def cell(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or a part of it: `reward_model.ground_truth`, `messages.0.content`.

    Raises:
        ValueError: the column has no such part; a short reason.
    """
    if name in row or "." not in name:
        return row.get(name)
    value: Any = row
    for part in name.split("."):
        try:
            value = value[int(part) if isinstance(value, list) else part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"no {name}") from None
    return value


def cell_text(value: Any, name: str) -> str:
    """The text of a cell; of a number, all its digits without a decimal zero; nothing of a gap.

    Raises:
        ValueError: it is neither; a short reason that names the type and what to do.
    """
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        digits = format(Decimal(str(value)), "f")
        return digits.rstrip("0").rstrip(".") if "." in digits else digits
    if isinstance(value, list | dict) and value:
        kind, part = ("list", 0) if isinstance(value, list) else (f"struct ({', '.join(value)})", [*value][-1])
        raise ValueError(f"{name} is a {kind}: name a part of it, such as {name}.{part}")
    raise ValueError(f"{name} is of type {type(value).__name__}: give it as text or as a finite number")


def asked_text(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """What these columns ask: their texts, or line by line where they hold several.

    A list holds a text an entry. So does a struct of lists: the first entries of all, the second ones, with what is
    named `label` in front.

    Raises:
        ValueError: as `cell` and `cell_text`.
    """
    texts = []
    for name in names:
        value = cell(row, name)
        if isinstance(value, dict) and all(isinstance(entries, list) for entries in value.values()):
            columns = [value[key] for key in sorted(value, key=lambda key: key != "label")]
            value = [" ".join(cell_text(part, name) for part in entry) for entry in zip_longest(*columns)]
        places = {f"{name}.{i}": entry for i, entry in enumerate(value)} if isinstance(value, list) else {name: value}
        texts += [text for place, entry in places.items() if (text := cell_text(entry, place).strip())]
    return ("\n" if len(texts) > len(names) else " ").join(texts)


def split_answer(answer: str, pattern: str) -> tuple[str, str]:
    """Return the reasoning and the final answer.

    pattern: `gsm8k`, the final answer follows the last "####"; `boxed`, it stands in the last `\\boxed{}`, and all the
        text is the reasoning; `whole`, there is no reasoning; or a regular expression: its first group, or all that it
        matches, in the last place where it does, and what stands before the match is the reasoning.

    Raises:
        ValueError: there is no final answer; a short reason.
    """
    if pattern == "whole":
        return "", answer
    if pattern == "boxed":
        box, start, end = _last_box(answer)
        return answer[:box] + answer[start:end] + answer[end + 1 :], answer[start:end]
    if pattern in ("gsm8k", "####"):
        reasoning, separator, result = CALCULATOR_MARK.sub("", answer).rpartition("####")
        if not separator:
            raise ValueError("no ####")
        if "<<" in reasoning + result or ">>" in reasoning + result:
            raise ValueError("broken calculator mark")
        return reasoning, result
    matches = list(re.finditer(pattern, answer))
    if not matches:
        raise ValueError("no match of --answer_pattern")
    return answer[: matches[-1].start()], matches[-1][1 if matches[-1].re.groups else 0] or ""


def _last_box(text: str) -> tuple[int, int, int]:
    """Where the last `\\boxed{}` begins, and its content begins and ends; braces within it may be nested."""
    depth = 1
    for box in list(BOX.finditer(text))[-1:]:
        for brace in BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return box.start(), box.end(), brace.start()
    raise ValueError("no \\boxed{}")


def check_answer_pattern(pattern: str) -> None:
    """Raises: UserError, it is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"--answer_pattern '{pattern}' is no regular expression ({error}): mend it.") from error
