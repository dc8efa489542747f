"""What reaches the prompt and the truth is what the file says, or is refused by name and type."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Features, List, Value
from pyarrow import parquet

from src.data import load_examples
from src.reward_set import Reward, RewardSet, built_in
from tests.test_data import user_error


def truth(path: Path, **columns: Any) -> str:
    """The first row's final answer; the file has another row, which is held out."""
    [example] = load_examples(str(path), "train", answer_pattern="whole", **columns)[0]
    return example.answer


def reason(path: Path, **columns: Any) -> str:
    """Why its rows are refused."""
    message = user_error(str(path), answer_pattern="whole", **columns)
    return message.partition(" (1 x ")[2].partition("): give it")[0]


def write_json(tmp_path: Path, cell: str, column: str = "answer") -> Path:
    """Two rows with this JSON text in a column."""
    cells = {"question": '"q"', "answer": "1"} | {column: cell}
    path = tmp_path / "all.jsonl"
    path.write_text(f'{{"question": {cells["question"]}, "answer": {cells["answer"]}}}\n' * 2, encoding="utf-8")
    return path


def write_parquet(tmp_path: Path, cells: pa.Array) -> Path:
    path = tmp_path / "all.parquet"
    parquet.write_table(pa.table({"question": ["q"] * len(cells), "answer": cells}), path)
    return path


class TestJson:
    @pytest.mark.parametrize(
        ("cell", "text"),
        [
            ('"2024-01-05"', "2024-01-05"),
            ('"2024-01-05T10:00:00Z"', "2024-01-05T10:00:00Z"),
            ('"NA"', "NA"),
            ('"007"', "007"),
            ('"1e5"', "1e5"),
            ('"1.50"', "1.50"),
            ('"\\ud83c\\udf4e"', "🍎"),
            ("12345678901234567890123", "12345678901234567890123"),
            ("-9007199254740993", "-9007199254740993"),
            ("145.0", "145"),
            ("100", "100"),
            ("0.1", "0.1"),
            ("0.50", "0.5"),
            ("0.00001", "0.00001"),
            ("1e5", "100000"),
            ("2.5e-7", "0.00000025"),
            ("0.10000000000000001", "0.1"),
            ("3.14159265358979323846", "3.141592653589793"),
            ("true", "True"),
        ],
    )
    def test_text_stays_text_and_numbers_keep_their_digits(self, tmp_path, cell, text):
        assert truth(write_json(tmp_path, cell)) == text

    @pytest.mark.parametrize(
        ("cell", "why"),
        [
            ('["5"]', "answer is a list: name a part of it, such as answer.0"),
            (
                '{"style": "rule", "truth": "5"}',
                "answer is a struct (style, truth): name a part of it, such as answer.truth",
            ),
            ("[]", "answer is of type list: give it as text or as a finite number"),
            ("Infinity", "answer is of type float: give it as text or as a finite number"),
            ("1e400", "answer is of type float: give it as text or as a finite number"),
            ("null", "empty answer"),
            ("NaN", "empty answer"),
            ('""', "empty answer"),
        ],
    )
    def test_what_is_neither_is_refused_by_name_and_type(self, tmp_path, cell, why):
        assert reason(write_json(tmp_path, cell)) == why

    def test_the_name_of_a_part_never_breaks_the_line(self, tmp_path):
        assert reason(write_json(tmp_path, '{"a\\n\\tb": 1}')).startswith("answer is a struct (a b): name a part")


class TestParquet:
    @pytest.mark.parametrize(
        ("cells", "text"),
        [
            (pa.array([0.1, 0], pa.float32()), "0.1"),
            (pa.array([16777216, 0], pa.float32()), "16777216"),
            (pa.array(np.array([0.1, 0], np.float16)), "0.1"),
            (pa.array([0.1, 0], pa.float64()), "0.1"),
            (pa.array([72, None], pa.float64()), "72"),
            (pa.array([2**64 - 1, 0], pa.uint64()), "18446744073709551615"),
            (pa.array([2**53 + 1, None], pa.int64()), "9007199254740993"),
            (pa.array([Decimal("72.00"), None]), "72"),
            (pa.array([Decimal("0.10"), None]), "0.1"),
            (pa.array([Decimal(10**49 + 1), None], pa.decimal256(60, 0)), str(10**49 + 1)),
            (pa.array(["NA", "b"]).dictionary_encode(), "NA"),
            (pa.array(["x", "y"], pa.string_view()), "x"),
        ],
    )
    def test_numbers_of_every_width_are_what_was_written(self, tmp_path, cells, text):
        assert truth(write_parquet(tmp_path, cells)) == text

    @pytest.mark.parametrize(
        ("cells", "kind"),
        [
            (pa.array([datetime.date(2024, 1, 5)] * 2), "date"),
            (pa.array([datetime.datetime(2024, 1, 5)] * 2), "datetime"),
            (pa.array([datetime.timedelta(1)] * 2), "timedelta"),
            (pa.array([b"5"] * 2), "bytes"),
        ],
    )
    def test_dates_and_bytes_are_refused_by_name_and_type(self, tmp_path, cells, kind):
        path = write_parquet(tmp_path, cells)
        assert reason(path) == f"answer is of type {kind}: give it as text or as a finite number"
        said = reason(path, question_column=["answer"], answer_column="question")
        assert said == f"answer is of type {kind}: give it as text or as a finite number"

    def test_a_class_label_is_its_name_and_the_rest_is_the_same_at_any_depth(self, tmp_path):
        names, exact = ClassLabel(names=["A", "B"]), Value("float32")
        features = Features({"question": {"n": [exact], "y": List(names)}, "answer": names, "mixed": datasets.Json()})
        rows = [{"question": {"n": [0.1], "y": [0, 1]}, "answer": 1, "mixed": 5}] * 2 + [
            {"question": {"n": [1], "y": [0]}, "answer": -1, "mixed": "five"}
        ]
        saved = datasets.Dataset.from_list(rows, features=features)
        saved.to_parquet(tmp_path / "all.parquet")
        saved.save_to_disk(tmp_path / "saved")
        for path in (tmp_path / "all.parquet", tmp_path / "saved"):
            examples, dropped = load_examples(str(path), "train", 0, ["question.n"], "answer", "whole")
            assert [(e.question, e.answer) for e in examples] == [("0.1", "B")] * 2 and not dropped
            assert examples[0].columns == {"mixed": 5}
            assert "(1 x empty answer)" in user_error(str(path), "test", question_column=["question.n"])
            [first, _], _ = load_examples(str(path), "train", 0, ["question.y"], "mixed", columns=())
            assert (first.question, first.answer, first.columns) == ("A\nB", "5", {})


class TestSeparatedText:
    @pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
    @pytest.mark.parametrize("name", ["all.csv", "all.tsv"])
    def test_the_separator_is_the_one_of_the_header(self, tmp_path, mark, name):
        rows = [["id", "a question, long; or not", "answer"], [1, "x; y, z", "NA"], [2, "two\nlines", "1,080"]]
        text = "".join(mark.join(f'"{cell}"' for cell in row) + "\r\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8-sig", newline="")
        examples, _ = load_examples(str(tmp_path / name), "train", 0, ["a question, long; or not"], "answer", "whole")
        assert [(e.question, e.answer) for e in examples] == [("x; y, z", "NA")]
        examples, _ = load_examples(str(tmp_path / name), "test", 0, ["a question, long; or not"], "answer", "whole")
        assert [(e.question, e.answer) for e in examples] == [("two\nlines", "1,080")]

    @pytest.mark.parametrize(
        ("cell", "text", "as_column"),
        [
            ("NA", "NA", "NA"),
            ("null", "null", "null"),
            ("2024-01-05", "2024-01-05", "2024-01-05"),
            ("007", "007", "007"),
            ("+5", "+5", "+5"),
            ("1e5", "1e5", "1e5"),
            ("true", "true", "true"),
            ("145.0", "145", 145.0),
            ("12345678901234567890", "12345678901234567890", 12345678901234567890),
            ("9007199254740993", "9007199254740993", 9007199254740993),
            ("-3", "-3", -3),
            ("0.25", "0.25", 0.25),
        ],
    )
    def test_a_bare_number_is_a_number_and_all_else_is_text_as_it_stands(self, tmp_path, cell, text, as_column):
        path = tmp_path / "all.csv"
        path.write_text(f"question,answer,level\nq,{cell},{cell}\nq,,\n", encoding="utf-8")  # with a gap
        [example] = load_examples(str(path), "train", answer_pattern="whole")[0]
        assert example.answer == text and example.columns == {"level": as_column}
        assert type(example.columns["level"]) is type(as_column)
        assert "(1 x empty answer)" in user_error(str(path), "test", answer_pattern="whole")

    def test_a_cell_of_any_length_is_read_and_a_row_that_ends_early_has_no_answer(self, tmp_path):
        path = tmp_path / "all.csv"
        path.write_text(f"question,answer,image\nq,5,{'x' * 200_000}\n\nq\n", encoding="utf-8")
        assert truth(path) == "5"
        assert "(1 x empty answer)" in user_error(str(path), "test", answer_pattern="whole")


class TestQuestions:
    @pytest.mark.parametrize(
        ("cell", "text"),
        [
            ('["A) 0", "B) 1"]', "Which?\nA) 0\nB) 1"),
            ('[1, 2.50, "x", null, " "]', "Which?\n1\n2.5\nx"),
            ('{"text": ["0", "1"], "label": ["A", "B"]}', "Which?\nA 0\nB 1"),
            ('{"key": ["A", "B"], "value": [0, 1]}', "Which?\nA 0\nB 1"),
            ('["only"]', "Which? only"),
            ('"text"', "Which? text"),
            ("[]", "Which?"),
            ("null", "Which?"),
        ],
    )
    def test_a_list_and_a_struct_of_lists_are_asked_in_order(self, tmp_path, cell, text):
        path = tmp_path / "all.jsonl"
        path.write_text(f'{{"question": "Which?", "options": {cell}, "answer": "B"}}\n' * 2, encoding="utf-8")
        [example] = load_examples(str(path), "train", 0, ["question", "options"], "answer", "whole")[0]
        assert example.question == text

    @pytest.mark.parametrize(
        ("cell", "why"),
        [
            (
                '[{"role": "user", "content": "q"}]',
                "question.0 is a struct (role, content): name a part of it, such as question.0.content",
            ),
            ('{"A": "0", "B": "1"}', "question is a struct (A, B): name a part of it, such as question.B"),
            ('[["A", "0"]]', "question.0 is a list: name a part of it, such as question.0.0"),
            ('{"text": ["0"], "more": [["x"]]}', "question is a list: name a part of it, such as question.0"),
            ("[]", "empty question"),
        ],
    )
    def test_what_is_no_text_is_refused_with_what_to_say(self, tmp_path, cell, why):
        assert reason(write_json(tmp_path, cell, "question")) == why


NESTED = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
    "reward_model": {"style": "rule", "ground_truth": 2},
    "extra.name": "literal",
    "extra": {"name": "nested"},
}


class TestNestedNames:
    @pytest.mark.parametrize(
        ("question", "answer"),
        [
            ("prompt.1.content", "reward_model.ground_truth"),
            ("prompt.-1.content", "reward_model.ground_truth"),
        ],
    )
    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_a_name_may_go_into_structs_and_lists(self, tmp_path, question, answer, kind):
        path = tmp_path / f"all.{kind}"
        if kind == "jsonl":
            path.write_text(f"{json.dumps(NESTED)}\n" * 2, encoding="utf-8")
        else:
            datasets.Dataset.from_list([NESTED] * 2).to_parquet(path)
        for columns in (None, ()):
            [example] = load_examples(str(path), "train", 0, [question], answer, columns=columns)[0]
            assert (example.question, example.answer) == ("1+1?", "2")
        assert truth(path, question_column=[question], answer_column="extra.name") == "literal"

    @pytest.mark.parametrize("name", ["reward_model.truth", "prompt.2.content", "prompt.role", "prompt.0.content.x"])
    def test_a_part_that_is_not_there_is_no_empty_answer(self, tmp_path, name):
        path = tmp_path / "all.jsonl"
        path.write_text(f"{json.dumps(NESTED)}\n" * 2, encoding="utf-8")
        assert reason(path, question_column=["extra.name"], answer_column=name) == f"no {name}"
        assert (
            "has no columns extra.name and other.name (it has prompt, reward_model, extra.name, extra)"
            in user_error(str(path), question_column=["extra.name"], answer_column="other.name")
        )


class TestOtherColumns:
    @pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved"])
    @pytest.mark.parametrize(
        ("columns", "kept"), [(None, {"level", "image", "Q"}), ((), set()), ({"level", "answer", "x"}, {"level"})]
    )
    def test_only_those_asked_for_are_kept(self, tmp_path, kind, columns, kept):
        rows = [{"Q": f"q{n}", "answer": 1, "level": n, "image": "x" * 1000} for n in range(20)]
        table, path = datasets.Dataset.from_list(rows), tmp_path / f"all.{kind}"
        write = {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet, "saved": table.save_to_disk}
        write[kind](path)
        examples, _ = load_examples(str(path), "train", question_column=["Q"], columns=columns)
        assert len(examples) == 18 and {name for example in examples for name in example.columns} == kept

    def test_rewards_ask_for_what_they_name_or_for_all(self):
        def level(completion: str, answer: str) -> float: ...
        def batch(completions: list[str], level: list[int]) -> list[float]: ...
        def example(completion: str, example: object) -> float: ...
        def anything(completions: list[str], **columns: list) -> list[float]: ...

        asked = [RewardSet(tuple(Reward("r", 1.0, f) for f in some)).columns for some in ([level, batch], [example])]
        assert asked == [{"completion", "answer", "completions", "level"}, None]
        assert RewardSet((Reward("r", 1.0, level), Reward("s", 1.0, anything))).columns is None
        assert built_in().columns == {"completion", "answer"}
