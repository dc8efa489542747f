"""A run's problems: which fit, which are held out, whether there are enough, whether they are still the same."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.arithmetic import describe_texts
from src.data import Example, encode_prompts, load_examples
from src.engine.models import check_room
from src.engine.sampling import decode
from src.errors import UserError
from src.rewards import TAGS

log = logging.getLogger(__name__)


def load_splits(
    dataset: str,
    seed: int,
    columns: Sequence[Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    max_prompt_tokens: int,
    max_completion_tokens: int,
) -> tuple[list[Example], list[Example]]:
    """The training and the test problems whose prompts fit; no test question is ever trained on.

    columns: what `load_examples` takes after the seed.

    Raises:
        UserError: as `load_examples`, nothing is left, or a prompt and its completion are more than the model takes.
    """
    fitting: dict[str, list[Example]] = {}
    for split in ("train", "test"):
        examples, dropped = load_examples(dataset, split, seed, *columns)
        prompts = encode_prompts(tokenizer, [example.question for example in examples], system_prompt)
        short = [(e, ids) for e, ids in zip(examples, prompts, strict=True) if len(ids) <= max_prompt_tokens]
        dropped[f"prompt over {max_prompt_tokens} tokens"] = len(examples) - len(short)
        reasons = "".join(f"; dropped {count}: {reason}" for reason, count in sorted(dropped.items()) if count)
        log.info("data: %d %s problems from %s%s", len(short), split, dataset, reasons)
        if not short:
            raise UserError(f"No {split} problem fits into --max_prompt_tokens {max_prompt_tokens}: raise it.")
        check_room(model, [ids for _, ids in short], max_completion_tokens)
        fitting[split] = [example for example, _ in short]
    written = "".join(decode(tokenizer, tokenizer(TAGS, add_special_tokens=False)["input_ids"]))
    if lost := [tag for tag in TAGS if tag not in written]:
        log.warning("model: its tokenizer cannot write %s: rewards that look for that give 0", ", ".join(lost))
    if texts := describe_texts([example.answer for split in fitting.values() for example in split]):
        log.warning("data: %s", texts)
    train = without_test_questions(**fitting)
    if shared := len(fitting["train"]) - len(train):
        log.warning("data: %d training problems left out: their questions are test questions", shared)
    if not train:
        raise UserError("Every training problem is a test problem, too: give a --dataset with other test problems.")
    return train, fitting["test"]


def without_test_questions(train: Sequence[Example], test: Sequence[Example]) -> list[Example]:
    """The training problems whose question is no test question, apart from case and white space."""
    asked = {_plain(example.question) for example in test}
    return [example for example in train if _plain(example.question) not in asked]


def _plain(question: str) -> str:
    return " ".join(question.casefold().split())


def cold_start_targets(train: Sequence[Example]) -> list[Example]:
    """The training problems that a cold start can learn from."""
    targets = [example for example in train if example.reasoning]
    if without := len(train) - len(targets):
        log.info("data: %d training problems have no reasoning, so no target for a cold start", without)
    return targets


def check_sizes(train: Sequence[Example], prompts_per_step: int, targets: Sequence[Example], batch_size: int) -> None:
    """Raise UserError when the problems do not fill a step. batch_size: of the cold start; 0: there is none."""
    if batch_size and not targets:
        raise UserError("--cold_start_steps needs answers with reasoning, and the data has none: leave it out.")
    sizes = {"prompts_per_step": (prompts_per_step, train), "cold_start_batch_size": (batch_size, targets)}
    for name, (size, problems) in sizes.items():
        if size > len(problems):
            raise UserError(f"--{name} is {size}, but there are {len(problems)} training problems for it: lower it.")


def fingerprint_examples(examples: Sequence[Example]) -> str:
    """Return a short hash of the examples in their order: equal for equal data."""
    texts = (repr((e.question, e.reasoning, e.answer, sorted(e.columns.items()))) for e in examples)
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]
