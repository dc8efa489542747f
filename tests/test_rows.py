"""Rows from files, folders, the Hub and the embedded problems, and what is said of those that cannot be read."""

import bz2
import gzip
import json
import logging
import lzma
import math
import os
import re
import time
from collections import Counter

import datasets
import pytest

from src import rows
from src.data import Example, format_target, load_examples, parse_row
from tests.test_data import CLIPS, answers, row, user_error, write_jsonl


class TestLocalFiles:
    @pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".JSONL"])
    def test_every_format_gives_the_same_examples(self, tmp_path, suffix):
        path = tmp_path / f"train{suffix}"
        rows = [CLIPS, row(5)]
        table = datasets.Dataset.from_list(rows)
        if suffix == ".json":
            path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
        elif suffix in (".csv", ".tsv"):
            table.to_csv(path, sep="\t" if suffix == ".tsv" else ",")
        elif suffix == ".parquet":
            table.to_parquet(path)
        else:
            write_jsonl(path, rows)
        write_jsonl(tmp_path / "test.jsonl", [row(6)])
        assert load_examples(str(tmp_path), "train") == ([parse_row(**CLIPS), parse_row(**row(5))], Counter())

    @pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
    @pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
    def test_packed_text_is_the_same_text(self, tmp_path, kind, ending, pack):
        rows = [row(1), row(2)]
        text = {
            "jsonl": "".join(json.dumps(r) + "\n" for r in rows),
            "json": json.dumps(rows, indent=1),
            "csv": "question,answer\n" + "".join('{question},"{answer}"\n'.format(**r) for r in rows),
        }[kind]
        path = tmp_path / f"all.{kind}.{ending}"
        path.write_bytes(pack(text.encode()))
        assert answers(load_examples(str(path), "train")[0]) == ["1"]
        path.write_bytes(pack(text.encode())[:-12])
        assert "check that the file is not empty or damaged" in user_error(str(path))

    def test_byte_order_mark_and_windows_line_ends_are_fine(self, tmp_path):
        lines = "".join(json.dumps(r) + "\r\n" for r in (CLIPS, row(5)))
        (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
        (tmp_path / "test.csv").write_bytes(b'\xef\xbb\xbfquestion,answer\r\nq5,"It is 5.\r\n#### 5"\r\n')
        assert load_examples(str(tmp_path), "train")[0] == [parse_row(**CLIPS), parse_row(**row(5))]
        assert load_examples(str(tmp_path), "test")[0] == [parse_row(**row(5))]

    def test_a_folder_gives_each_split_its_own_file(self, tmp_path):
        write_jsonl(tmp_path / "train.jsonl", [row(1), row(2)])
        write_jsonl(tmp_path / "test.jsonl", [row(3)])
        (tmp_path / "train.txt").write_text("notes")
        assert answers(load_examples(str(tmp_path), "train")[0]) == ["1", "2"]
        assert answers(load_examples(str(tmp_path), "test")[0]) == ["3"]

    @pytest.mark.parametrize(("rows", "test_rows"), [(2, 1), (19, 1), (30, 3), (12_000, 1000)])
    def test_the_last_tenth_of_a_single_file_is_its_test_split(self, tmp_path, rows, test_rows):
        path = write_jsonl(tmp_path / "all.jsonl", [row(i) for i in range(rows)])
        train, test = (answers(load_examples(path, split)[0]) for split in ("train", "test"))
        assert len(test) == test_rows
        assert train + test == [str(i) for i in range(rows)]

    def test_unusable_rows_are_counted_by_reason(self, tmp_path):
        rows = [
            row(1),
            {"question": None, "answer": "a\n#### 1"},
            {"question": "q", "answer": None},
            {"question": "q", "answer": 72},
            {"question": "q", "answer": "it is 72"},
            {"answer": "a\n#### 1"},
            {"question": 5, "answer": "It is 5.\n#### 5"},
            {"question": "q2", "answer": math.nan},
            {"question": "q3", "answer": "\ud83d\n#### 1"},
        ]
        write_jsonl(tmp_path / "train.jsonl", rows)
        write_jsonl(tmp_path / "test.jsonl", [row(6)])
        examples, dropped = load_examples(str(tmp_path), "train")
        assert [(example.question, example.answer) for example in examples] == [("q1", "1"), ("q", "72"), ("5", "5")]
        assert dropped == {"empty question": 2, "empty answer": 2, "no ####": 1, "half a character in the text": 1}

    def test_a_path_with_wildcards_or_a_tilde_is_taken_literally(self, tmp_path, monkeypatch):
        folder = tmp_path / "run[1] *"
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", [row(1), row(2)])
        monkeypatch.setenv("HOME", str(tmp_path))
        assert answers(load_examples("~/run[1] *", "train")[0]) == ["1"]

    def test_a_changed_file_is_read_again_and_nothing_is_left_beside_it(self, tmp_path):
        path = tmp_path / "train.jsonl"
        write_jsonl(path, [row(1), row(3)])
        stat = path.stat()
        assert answers(load_examples(str(tmp_path), "train")[0]) == ["1"]
        write_jsonl(path, [row(2), row(3)])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
        assert answers(load_examples(str(tmp_path), "train")[0]) == ["2"]
        assert os.listdir(tmp_path) == ["train.jsonl"]

    def test_reading_is_silent_and_leaves_the_library_as_it_was(self, tmp_path, monkeypatch, caplog, capfd):
        write_jsonl(tmp_path / "train.jsonl", [row(1)])
        (tmp_path / "test.jsonl").write_bytes(bytes(range(256)))
        monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)  # so that caplog sees its messages
        datasets.enable_progress_bars()
        datasets.logging.set_verbosity(logging.WARNING)
        load_examples(str(tmp_path), "train")
        user_error(str(tmp_path), "test")
        assert caplog.messages == []
        assert capfd.readouterr() == ("", "")
        assert not datasets.are_progress_bars_disabled()
        assert datasets.logging.get_verbosity() == logging.WARNING


class TestLocalFailures:
    @pytest.mark.parametrize(
        "dataset", ["./none", "a/b/c", "none.jsonl", "data/none.csv", "/none", "~/none", "", "a\0b"]
    )
    def test_a_path_that_does_not_exist(self, tmp_path, monkeypatch, dataset):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        shown = dataset.replace("\0", "\\x00")
        assert user_error(dataset).startswith(f"There is no file or folder '{shown}': check the path")

    @pytest.mark.parametrize("name", ["rows.txt", "rows.xlsx", "rows.jsonl.zip", "rows"])
    def test_an_unknown_format(self, tmp_path, name):
        (tmp_path / name).write_text("q,a")
        message = user_error(str(tmp_path / name))
        assert "its name should end in .jsonl, .ndjson, .json, .csv, .tsv or .parquet, where text may be" in message

    @pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv", "train.parquet"])
    @pytest.mark.parametrize("content", [b"", bytes(range(256)) * 8, b"\x00" * 64], ids=["empty", "garbage", "zeros"])
    def test_an_empty_or_damaged_file(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        assert user_error(str(tmp_path)).startswith(
            (f"Cannot read rows from '{tmp_path / name}'", f"'{tmp_path / name}'")
        )

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("cut.jsonl", json.dumps(CLIPS).encode() + b"\n" + json.dumps(CLIPS).encode()[:-20]),
            ("blank.jsonl", b"\n\n"),
            ("none.json", b"[]"),
            ("number.json", b"3"),
            ("texts.json", b'["a", "b"]'),
            ("two.json", b'[{"question": "q", "answer": 1}]\n[{"question": "q", "answer": 2}]'),
            ("splits.json", b'{"train": [1, 2], "test": []}'),
            ("more.csv", b"question,answer\nq,1\nq,1,080\n"),
            ("twice.csv", b"question,answer,answer\nq,1,2\n"),
            ("quote.csv", b'question,answer\n"q" he said,1\nq,"2\n'),
            ("latin1.jsonl", '{"question": "café", "answer": "x\\n#### 1"}\n'.encode("latin-1")),
            ("latin1.csv", "question,answer\ncafé,x #### 1\n".encode("latin-1")),
            ("header.csv", b"question,answer\n"),
        ],
    )
    def test_a_file_that_cannot_be_read(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        message = user_error(str(tmp_path / name))
        assert message.startswith(f"Cannot read rows from '{tmp_path / name}' (") and " rows were fine): " in message
        assert message.endswith("check that the file is not empty or damaged, and that its text is UTF-8.")

    def test_a_missing_column_is_named_with_those_there(self, tmp_path):
        path = write_jsonl(tmp_path / "all.jsonl", [{"question": "q", "solution": "a"}] * 2)
        assert user_error(path) == (
            f"'{path}' has no columns question and answer (it has question, solution): "
            "name its own with --question_column and --answer_column."
        )

    def test_a_file_without_a_usable_row_says_why(self, tmp_path):
        write_jsonl(
            tmp_path / "train.jsonl", [{"question": "q", "answer": "72"}] * 2 + [{"question": "", "answer": "x"}]
        )
        write_jsonl(tmp_path / "test.jsonl", [row(1)])
        assert "has no usable row (2 x no ####, 1 x empty question): give it a question" in user_error(str(tmp_path))

    def test_a_single_row_leaves_the_train_split_empty(self, tmp_path):
        path = write_jsonl(tmp_path / "all.jsonl", [row(1)])
        assert f"The train split of '{path}' has no usable row (it is empty)" in user_error(path)


class TestSynthetic:
    def test_synthetic_rows_come_from_the_split_and_seed_asked_for(self, monkeypatch):
        def synthetic_rows(split: str, seed: int) -> list[dict[str, str]]:
            return [row({"train": 10, "test": 20}[split] + seed)]

        monkeypatch.setattr(rows, "synthetic_rows", synthetic_rows)
        assert answers(load_examples("synthetic", "train", seed=3)[0]) == ["13"]
        assert answers(load_examples("synthetic", "test")[0]) == ["20"]


def on_hub(**splits: list[dict]) -> datasets.DatasetDict:
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})


class TestHub:
    """The network is never touched: `hub_problem` or `load_dataset` is replaced."""

    @pytest.mark.parametrize(
        ("dataset", "config"), [("openai/gsm8k", "main"), ("someone/my.set-2", None), ("single_name", None)]
    )
    def test_a_hub_id_loads_with_its_config(self, monkeypatch, dataset, config):
        def load_dataset(path: str, name: str | None) -> datasets.DatasetDict:
            assert (path, name) == (dataset, config)
            return on_hub(train=[row(1)], other=[CLIPS])

        monkeypatch.setattr(rows, "hub_problem", lambda: None)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert load_examples(dataset, "other") == ([parse_row(**CLIPS)], Counter())
        assert user_error(dataset, "tset") == f"'{dataset}' has no split 'tset': choose one of train, other."

    def test_without_network_the_cached_copy_is_used(self, monkeypatch):
        def load_dataset(*args: object) -> datasets.DatasetDict:
            assert datasets.config.HF_HUB_OFFLINE
            return on_hub(train=[CLIPS], test=[row(1)])

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(rows, "hub_problem", lambda: "no route to host")
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert load_examples("openai/gsm8k", "train")[0] == [parse_row(**CLIPS)]
        assert not datasets.config.HF_HUB_OFFLINE

    def test_without_network_and_cache_it_fails_at_once(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        monkeypatch.setattr(rows, "hub_problem", lambda: "no route to host")
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited to try again"))
        message = user_error("openai/gsm8k")
        assert "Cannot load 'openai/gsm8k' from the Hugging Face Hub" in message and "(no route to host)" in message
        assert "pass a local path, or `synthetic`" in message
        assert not datasets.config.HF_HUB_OFFLINE

    def test_what_the_hub_refuses_is_told_in_one_line(self, monkeypatch):
        def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
            raise ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']")

        monkeypatch.setattr(rows, "hub_problem", lambda: None)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert "(Config name is missing. Please pick one among: ['a', 'b']): " in user_error("openai/gsm8k")

    def test_a_hub_dataset_without_the_columns_is_a_user_error(self, monkeypatch):
        monkeypatch.setattr(rows, "hub_problem", lambda: None)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args: on_hub(train=[{"text": "x"}]))
        assert "'a/b' has no columns question and answer (it has text)" in user_error("a/b")

    def test_a_local_folder_wins_over_a_hub_id(self, tmp_path, monkeypatch):
        (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
        write_jsonl(tmp_path / "openai" / "gsm8k" / "train.jsonl", [row(1), row(2)])
        monkeypatch.chdir(tmp_path)
        assert answers(load_examples("openai/gsm8k", "train")[0]) == ["1"]


@pytest.fixture(scope="module")
def real_examples() -> list[Example]:
    train, dropped_train = load_examples(os.environ["GSM8K_DIR"], "train")
    test, dropped_test = load_examples(os.environ["GSM8K_DIR"], "test")
    assert (len(train), len(test), dropped_train, dropped_test) == (7473, 1319, {}, {})
    return train + test


@pytest.mark.skipif("GSM8K_DIR" not in os.environ, reason="set GSM8K_DIR to a folder with GSM8K's train and test files")
class TestRealData:
    def test_no_target_holds_a_calculator_mark_or_a_foreign_tag(self, real_examples):
        for target in map(format_target, real_examples):
            assert "<<" not in target and ">>" not in target
            assert len(re.findall(r"</?(?:reasoning|output|answer)>", target)) == 6

    def test_the_output_ends_the_reasoning_and_starts_a_sentence(self, real_examples):
        for example in real_examples:
            before, _, after = example.reasoning.rpartition(example.output)
            assert not any(map(str.isalnum, after)), example.reasoning
            assert before == "" or re.search(r"\n\Z|[.!?][\"')]*\s+\Z", before), example.reasoning
            assert "\n" not in example.output

    def test_no_output_begins_inside_a_number(self, real_examples):
        for example in real_examples:
            before = example.reasoning.rpartition(example.output)[0]
            assert not re.search(r"[\d.,$]\Z", before), example.reasoning

    def test_every_answer_is_a_number(self, real_examples):
        for example in real_examples:
            assert re.fullmatch(r"-?\d[\d,]*(\.\d+)?", example.answer), example.answer
