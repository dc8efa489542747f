"""From dataset rows to examples, prompts and the XML target.

A row is GSM8K's: a `question`, and an `answer` of the form "reasoning #### answer". It may come from the Hugging Face
Hub, a local file or folder, or `src.tiny`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from src.errors import UserError

SYSTEM_PROMPT = (
    "Solve the problem step by step. Reply in exactly this format: "
    "<reasoning>your steps</reasoning> "
    "<output>one sentence that states the result</output> "
    "<answer>the result as just the number, without words or units</answer>"
)

READERS = {
    ".jsonl": datasets.Dataset.from_json,
    ".json": datasets.Dataset.from_json,
    ".csv": datasets.Dataset.from_csv,
    ".parquet": datasets.Dataset.from_parquet,
}
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
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
    """One problem: `output` is the last sentence of `reasoning`, `answer` the text after the row's last "####"."""

    question: str
    reasoning: str
    output: str
    answer: str


def parse_row(question: str, answer: str) -> Example:
    """Read one GSM8K row, without its calculator marks (`<<48/2=24>>`), blank lines and white space at line ends.

    Raises:
        ValueError: the row cannot be used; the message is a short reason, the same for every such row.
    """
    question = question.strip()
    if not question:
        raise ValueError("empty question")
    if not answer.strip():
        raise ValueError("empty answer")
    reasoning, separator, result = CALCULATOR_MARK.sub("", answer).rpartition("####")
    if not separator:
        raise ValueError("no ####")
    if "<<" in reasoning + result or ">>" in reasoning + result:
        raise ValueError("broken calculator mark")
    if any(FORMAT_TAG.search(text) for text in (question, reasoning, result)):
        raise ValueError("format tag in the text")
    if not result.strip():
        raise ValueError("empty answer")
    reasoning = "\n".join(filter(None, map(str.strip, reasoning.splitlines())))
    return Example(question, reasoning, _last_sentence(reasoning), result.strip())


def _last_sentence(reasoning: str) -> str:
    """Return the last sentence that holds a letter or a digit; a line break ends a sentence."""
    starts = [0, *(match.end() for match in SENTENCE_END.finditer(reasoning) if match["end"])]
    end = len(reasoning)
    for start in reversed(starts):
        sentence = reasoning[start:end].strip()
        if any(map(str.isalnum, sentence)):
            return sentence
        end = start
    raise ValueError("empty reasoning")


def format_target(example: Example) -> str:
    """Return the completion that the model is taught: what a perfect answer to the example looks like."""
    tags = ("reasoning", "output", "answer")
    return " ".join(f"<{tag}>{getattr(example, tag)}</{tag}>" for tag in tags)


def chat_messages(question: str, system_prompt: str = SYSTEM_PROMPT) -> list[dict[str, str]]:
    """Return the conversation that asks `question`, for a tokenizer's chat template."""
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, questions: list[str], system_prompt: str = SYSTEM_PROMPT
) -> list[list[int]]:
    """Return each question's prompt as token ids (unpadded), ending where the assistant's turn begins.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if not questions:
        return []
    if tokenizer.chat_template is None:
        raise UserError(
            f"The tokenizer of '{tokenizer.name_or_path}' has no chat template, so it cannot be asked a question: "
            "choose a chat (instruct) model, or set chat_template in its tokenizer_config.json."
        )
    prompts = _render_prompts(tokenizer, questions, system_prompt)
    # The template has already written the begin token, if the model has one.
    return tokenizer(prompts, add_special_tokens=False)["input_ids"]


def _render_prompts(tokenizer: PreTrainedTokenizerBase, questions: list[str], system_prompt: str) -> list[str]:
    def render(chats: list[list[dict[str, str]]]) -> list[str]:
        return tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)

    # Some templates refuse a system role (Gemma), some drop it without a word (the first Phi-3).
    with suppress(TemplateError):
        prompts = render([chat_messages(question, system_prompt) for question in questions])
        if system_prompt.strip() in prompts[0]:
            return prompts
    return render([[{"role": "user", "content": f"{system_prompt}\n\n{question}"}] for question in questions])


def drop_long_prompts(
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    system_prompt: str = SYSTEM_PROMPT,
) -> tuple[list[Example], int]:
    """Return the examples whose prompt has at most `max_prompt_tokens` tokens, and how many others there were.

    Raises:
        UserError: as `encode_prompts`.
    """
    prompts = encode_prompts(tokenizer, [example.question for example in examples], system_prompt)
    kept = [example for example, ids in zip(examples, prompts, strict=True) if len(ids) <= max_prompt_tokens]
    return kept, len(examples) - len(kept)


def load_examples(dataset: str, split: str, seed: int = 0) -> tuple[list[Example], Counter[str]]:
    """Load one split of a dataset with the columns `question` and `answer`.

    Args:
        dataset: `synthetic`; a folder with `train.*` and `test.*`; one file (JSONL, JSON, CSV or Parquet); or the id
            of a dataset on the Hugging Face Hub. A file or folder wins over a Hub id of the same name. The last tenth
            of a single file (at least 1 row, at most 1,000) is its test split, what comes before is its train split.
        split: `train` or `test`; a Hub dataset may have others.
        seed: of the synthetic problems; files and Hub datasets are read in their own order.

    Returns:
        The usable rows in order, and how many rows were dropped, by reason.

    Raises:
        UserError: the dataset cannot be found, reached or read, lacks the split or a column, or has no usable row.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for row in _read_rows(dataset, split, seed):
        try:
            examples.append(parse_row(_cell_text(row["question"]), _cell_text(row["answer"])))
        except ValueError as reason:
            dropped[str(reason)] += 1
    if not examples:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.items()) or "it is empty"
        raise UserError(
            f"The {split} split of '{dataset}' has no usable row ({reasons}): "
            "add rows with a question, and an answer of the form 'reasoning #### 42'."
        )
    return examples, dropped


def _cell_text(cell: object) -> str:
    return str(cell) if isinstance(cell, str | int | float) else ""


def _read_rows(dataset: str, split: str, seed: int) -> list[dict[str, Any]]:
    local_path = os.path.expanduser(dataset)
    is_local = os.path.exists(local_path)
    path = Path(local_path)
    if (is_local or dataset == "synthetic") and split not in ("train", "test"):
        raise UserError(f"'{dataset}' has no split '{split}': choose train or test.")
    if dataset == "synthetic":
        from src.tiny import synthetic_rows

        return synthetic_rows(split, seed)
    if is_local and path.is_dir():
        return _read_file(_split_file(path, split))
    if is_local:
        rows = _read_file(path)
        first_test_row = len(rows) - min(1000, max(1, len(rows) // 10))
        return rows[:first_test_row] if split == "train" else rows[first_test_row:]
    if HUB_ID.fullmatch(dataset) and path.suffix.lower() not in READERS:
        return _read_hub(dataset, split)
    raise UserError(f"There is no file or folder '{dataset}': check the path, or name a Hub dataset like openai/gsm8k.")


def _split_file(folder: Path, split: str) -> Path:
    files = [path for path in sorted(folder.glob(f"{split}.*")) if path.suffix.lower() in READERS]
    if len(files) != 1:
        found = " and ".join(path.name for path in files) or "none"
        raise UserError(
            f"'{folder}' should hold one file for the {split} split, but holds {found}: "
            f"put its rows in one of {', '.join(split + suffix for suffix in READERS)}."
        )
    return files[0]


def _read_file(path: Path) -> list[dict[str, Any]]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"Cannot tell the format of '{path}': its name should end in one of {', '.join(READERS)}.")
    # A cache that lives as long as the call: nothing stale is ever served, and nothing is left behind.
    with tempfile.TemporaryDirectory() as cache, _quiet_datasets():
        try:
            rows = reader(glob.escape(str(path)), cache_dir=cache, keep_in_memory=True).to_list()
        except Exception as error:  # whatever pandas, pyarrow or the standard library thinks of a damaged file
            raise UserError(
                f"Cannot read rows from '{path}' ({_one_line(error.__cause__ or error)}): "
                "check that the file is not empty or damaged, and that its text is UTF-8."
            ) from error
    return _with_columns(rows, str(path))


def _with_columns(rows: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    if rows and not {"question", "answer"} <= rows[0].keys():
        raise UserError(
            f"'{source}' has no columns question and answer (it has {', '.join(rows[0])}): rename or add them."
        )
    return rows


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    had_bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def _read_hub(dataset: str, split: str) -> list[dict[str, Any]]:
    config = "main" if dataset == "openai/gsm8k" else None
    problem = hub_problem()
    was_offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = was_offline or problem is not None  # offline, a cached dataset still loads
    try:
        rows = datasets.load_dataset(dataset, config, split=split).to_list()
    except Exception as error:  # whatever the HTTP client, pyarrow or the standard library raises
        reason = problem if problem and isinstance(error, ConnectionError) else _one_line(error)
        raise UserError(
            f"Cannot load the {split} split of '{dataset}' from the Hugging Face Hub ({reason}), and no file or folder "
            "has that name: check the name, the split and the network, or pass a local path, or `synthetic`."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    return _with_columns(rows, dataset)


def hub_problem(timeout: float = 5.0) -> str | None:
    """Return why the Hugging Face Hub cannot be reached, or None if it answers.

    Asks once, through the Hub's own client, so that proxies, mirrors and offline mode count. Left to themselves,
    `datasets` and `transformers` retry for 25 seconds or more.

    Args:
        timeout: seconds to wait for a connection to one address, and then for an answer.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception as error:  # the client's HTTP library, and with it the error's type, differs by version
        return _one_line(error)
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def fingerprint_examples(examples: list[Example]) -> str:
    """Return a short hash of the examples in their order: equal for equal data."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.question, example.answer)).encode())
    return digest.hexdigest()[:16]
