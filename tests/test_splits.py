"""Which problems a run learns from and is tested on, and how it knows them again."""

import json
import logging
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from src.data import Example, load_examples
from src.errors import UserError
from src.splits import fingerprint_examples, load_splits, without_test_questions
from tests.helpers import tiny_model, word_tokenizer

COLUMNS = (["question"], "answer", "whole")


def write_split(folder: Path, split: str, questions: list[str], **more: object) -> None:
    rows = [{"question": question, "answer": 1, **more} for question in questions]
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_problems_with_a_longer_prompt_are_dropped_and_counted_in_both_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`word_tokenizer` makes <start>Be<end><start>QUESTION<end><start>: 7 tokens for "How", 9 for "How many"."""
    write_split(tmp_path, "train", ["How", "How many", "Tom"])
    write_split(tmp_path, "test", ["Tom has", "He"])
    caplog.set_level(logging.INFO)
    for most, train, test in ((10, 3, 2), (8, 2, 1)):
        caplog.clear()
        loaded = load_splits(str(tmp_path), 0, COLUMNS, tiny_model(vocab_size=99), word_tokenizer(), "Be", most, 12)
        assert tuple(map(len, loaded)) == (train, test)
        dropped = [f"; dropped 1: prompt over {most} tokens"] * 2 if most == 8 else ["", ""]
        counts = ((train, "train"), (test, "test"))
        assert [record.message for record in caplog.records] == [
            f"data: {count} {split} problems from {tmp_path}{more}"
            for (count, split), more in zip(counts, dropped, strict=True)
        ]


def test_a_prompt_that_leaves_no_room_for_the_completion_is_said_whichever_split_it_is_in(tmp_path: Path) -> None:
    """Prompts of 7 and 9 tokens, as above."""
    for long in ("train", "test"):
        for split, other in (("train", "How"), ("test", "Tom")):
            write_split(tmp_path, split, [other, "How many" if split == long else "He"])
        model = tiny_model(vocab_size=99, max_position_embeddings=20)
        load = partial(load_splits, str(tmp_path), 0, COLUMNS, model, word_tokenizer(), "Be")
        assert load(9, 11) and load(8, 13)  # the long one is left out
        with pytest.raises(UserError, match=r"takes 9 tokens .* is 12, but the model takes 20 tokens in all"):
            load(9, 12)


def test_final_answers_that_are_no_bare_numbers_are_counted_in_a_warning(tmp_path: Path, caplog) -> None:
    for answers, said in ((["5 stamps", "6"], True), (["5", "6"], False)):
        caplog.clear()
        for split, question in (("train", "How"), ("test", "Tom")):
            rows = [{"question": f"{question} {a}", "answer": a} for a in answers]
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        load_splits(str(tmp_path), 0, COLUMNS, tiny_model(vocab_size=99), word_tokenizer(), "Be", 50, 12)
        warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        text = "data: 2 of 4 final answers are no bare numbers, such as '5 stamps', and must be repeated"
        assert [warning.startswith(text) and "--answer_pattern" in warning for warning in warnings] == [True] * said


def test_a_tokenizer_that_cannot_write_the_tags_is_told_of(tmp_path: Path, caplog) -> None:
    """Without a token for a word it is the unknown one, which vanishes from a text."""
    for split, question in (("train", "How"), ("test", "Tom")):
        write_split(tmp_path, split, [question])
    for without in ([], ["</answer>", "<output>"]):
        caplog.clear()
        poor = word_tokenizer()
        words = json.loads(poor.backend_tokenizer.to_str())
        vocabulary = words["model"]["vocab"]
        words["model"]["vocab"] = {w if w not in without else f"no {i}": i for w, i in vocabulary.items()}
        poor = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(words)),
            chat_template=poor.chat_template,
            unk_token="<unk>",
            eos_token="<end>",
        )
        load_splits(str(tmp_path), 0, COLUMNS, tiny_model(vocab_size=99), poor, "Be", 50, 12)
        lines = [record.message for record in caplog.records if "cannot write" in record.message]
        told = "model: its tokenizer cannot write <output>, </answer>: rewards that look for that give 0"
        assert lines == [told] * bool(without)


def test_other_columns_make_another_fingerprint(tmp_path: Path) -> None:
    found = set()
    for more in ({}, {"level": 1}, {"level": 2}):
        write_split(tmp_path, "train", ["q", "r"], **more)
        found.add(fingerprint_examples(load_examples(str(tmp_path), "train")[0]))
    assert len(found) == 3


def test_another_solution_makes_another_fingerprint() -> None:
    """A cold start learns from it, and a reward may ask for it."""
    one, other = (Example("q", f"{text} = 2", "so 2", "2") for text in ("1 + 1", "5 - 3"))
    assert fingerprint_examples([one]) != fingerprint_examples([other])


QUESTIONS = st.lists(st.sampled_from(["a b", "A  b", "a b ", "ab", "b a", "ß", "SS", "a\nb", "é", "É"]))


@given(QUESTIONS, QUESTIONS)
def test_what_is_kept_shares_no_question_and_nothing_else_is_lost(train_questions: list[str], test: list[str]) -> None:
    examples = [Example(question, "r", "o", str(i)) for i, question in enumerate(train_questions)]
    kept = without_test_questions(examples, [Example(question, "", "", "") for question in test])
    banned = {tuple(question.casefold().split()) for question in test}
    assert kept == [example for example in examples if tuple(example.question.casefold().split()) not in banned]
