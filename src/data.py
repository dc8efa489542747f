"""From dataset rows to examples, prompts and the XML target.

A row has a question, and an answer that ends in the final one: by default GSM8K's columns and form, "reasoning ####
answer". Where rows come from is in `src.rows`; which of them a run learns from, in `src.splits`.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from src.cells import asked_text, cell, cell_text, check_answer_pattern, split_answer
from src.chat_template import render_prompts
from src.errors import UserError, one_line
from src.rows import read_rows

# Ends in a worked example: shown the form, an untrained model keeps to it and works in it far more often than told. The
# example takes several steps, since a model writes about as many as it is shown.
SYSTEM_PROMPT = """\
Solve the problem step by step. Reply in exactly this format:
<reasoning>the steps, one calculation a line</reasoning> <output>the last step once more</output> \
<answer>the result as just the number, without words or units</answer>

For example, to the problem "A school orders 6 boxes of 20 pens. It gives 15 pens to each of 4 classes and shares the \
rest equally among 12 teachers. How many pens does each teacher get?" reply:
<reasoning>The school has 6 * 20 = 120 pens.
The classes get 4 * 15 = 60 pens.
There are 120 - 60 = 60 pens for the teachers.
Each teacher gets 60 / 12 = 5 pens.</reasoning> <output>Each teacher gets 60 / 12 = 5 pens.</output> \
<answer>5</answer>"""

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can hold one, UTF-8 and so a tokenizer cannot
FORMAT_TAG = re.compile(r"</?(reasoning|output|answer)>", re.IGNORECASE)
# A "." ends a sentence only before white space, so never inside a number, and not before a small letter or an operator
# ("7 a.m. and", "10 sq. ft. = 20"). The first line swallows abbreviations that never end one.
SENTENCE_END = re.compile(
    r"""\b(?:Mrs?|Ms|Dr|St|vs|approx|i\.e|e\.g)\.
    | (?P<end> \n | [.!?]["'”’)\]]{0,2}\s(?!\s*[a-z=+*/×÷-]) )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Example:
    """One problem: `output` is the last sentence of `reasoning`, both "" where the row has none; `answer` is final.

    columns: whatever else the row holds, for reward functions that ask for it.
    """

    question: str
    reasoning: str
    output: str
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


def parse_row(question: str, answer: str, pattern: str = "gsm8k") -> Example:
    """Read one row, without calculator marks (GSM8K's `<<48/2=24>>`), blank lines and white space at line ends.

    pattern: as `split_answer`.

    Raises:
        ValueError: the row cannot be used; the message is a short reason, the same for every such row.
    """
    if not question.strip():
        raise ValueError("empty question")
    reasoning, result = split_answer(answer, pattern) if answer.strip() else ("", "")
    if any(FORMAT_TAG.search(text) for text in (question, reasoning, result)):
        raise ValueError("format tag in the text")
    if HALF_CHARACTER.search(question + answer):
        raise ValueError("half a character in the text")
    if not result.strip():
        raise ValueError("empty answer")
    reasoning = "\n".join(filter(None, map(str.strip, reasoning.splitlines())))
    output = _last_sentence(reasoning)
    return Example(question.strip(), reasoning if output else "", output, result.strip())


def read_system_prompt(path: str | None, built_in: str = SYSTEM_PROMPT) -> str:
    """The text of a file, or the built-in system prompt.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return built_in if path is None else Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read --system_prompt_file '{path}' ({one_line(error)}): give a text file.") from error


def _last_sentence(reasoning: str) -> str:
    """Return the last sentence that holds a letter or a digit, or ""; a line break ends a sentence."""
    ends = [match.end() for match in SENTENCE_END.finditer(reasoning) if match["end"]]
    sentences = [reasoning[start:end].strip() for start, end in pairwise([0, *ends, len(reasoning)])]
    return next((sentence for sentence in reversed(sentences) if any(map(str.isalnum, sentence))), "")


def format_target(example: Example) -> str:
    """Return the completion that the model is taught: what a perfect answer to the example looks like."""
    return " ".join(f"<{tag}>{getattr(example, tag)}</{tag}>" for tag in ("reasoning", "output", "answer"))


def chat_messages(question: str, system_prompt: str = SYSTEM_PROMPT) -> list[dict[str, str]]:
    """Return the conversation that asks `question`, for a tokenizer's chat template."""
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, questions: list[str], system_prompt: str = SYSTEM_PROMPT
) -> list[list[int]]:
    """Return each question's prompt as token ids (unpadded), ending where the assistant's turn begins.

    Raises:
        UserError: as `render_prompts`.
    """
    if not questions:
        return []
    # Some templates refuse a system role (Gemma), some drop it without a word (the first Phi-3).
    merged = [[{"role": "user", "content": f"{system_prompt}\n\n{question}"}] for question in questions]
    prompts = render_prompts(tokenizer, [chat_messages(question, system_prompt) for question in questions], merged)
    # The template has already written the begin token, if the model has one.
    return tokenizer(prompts, add_special_tokens=False)["input_ids"]


def load_examples(
    dataset: str,
    split: str,
    seed: int = 0,
    question_column: Sequence[str] = ("question",),
    answer_column: str = "answer",
    answer_pattern: str = "gsm8k",
    columns: Collection[str] | None = None,
) -> tuple[list[Example], Counter[str]]:
    """Load one split of a dataset.

    Args:
        dataset: `synthetic`; a folder with `train.*` and `test.*`, as it came from the Hub, or saved by `datasets`; one
            file (docs/custom.md says which are read); or the id of a dataset on the Hugging Face Hub. A file or folder
            wins over a Hub id of the same name. Where there is no test split the validation split stands for it, or
            the last tenth of the training split (at least 1 row, at most 1,000).
        split: `train`, `test`, or another one that the dataset has.
        seed: of the synthetic problems; files and Hub datasets are read in their own order.
        question_column: several columns are joined; a name may be a part of a column, `messages.0.content`.
        answer_column: numbers are final answers, whatever the pattern.
        answer_pattern: as `split_answer`.
        columns: which other columns to keep; None: all.

    Returns:
        The usable rows in order, and how many rows were dropped, by reason.

    Raises:
        UserError: the dataset cannot be found, reached or read, lacks the split or a column, or has no usable row.
    """
    examples, dropped = list[Example](), Counter[str]()
    check_answer_pattern(answer_pattern)
    for row in read_rows(dataset, split, seed, [*question_column, answer_column], columns):
        try:
            answer = cell(row, answer_column)
            pattern = answer_pattern if isinstance(answer, str) else "whole"
            example = parse_row(asked_text(row, question_column), cell_text(answer, answer_column), pattern)
            kept = (row.keys() if columns is None else row.keys() & columns) - {"question", "answer"}
            examples.append(replace(example, columns={name: row[name] for name in row if name in kept}))
        except ValueError as reason:
            dropped[one_line(reason)] += 1
    if not examples:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.most_common(3)) or "it is empty"
        what = f"The {split} split of '{dataset}' has no usable row ({reasons})"
        raise UserError(f"{what}: give it a question, and an answer where --answer_pattern finds one.")
    return examples, dropped
