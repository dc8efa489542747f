"""The folder with the problems of few calculations holds those, in their order, and every test problem."""

import json
from pathlib import Path

from benchmarks.easier import main, write_easier
from src.data import load_examples


def problem(name: str, calculations: int) -> dict[str, str]:
    steps = "".join(f"So {n}+1 = <<{n}+1={n + 1}>>{n + 1} “things”.\n" for n in range(calculations))
    return {"question": name, "answer": f"{steps}#### {calculations}"}


def write(folder: Path, **splits: list[dict[str, str]]) -> Path:
    folder.mkdir()
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_training_problems_are_those_of_one_calculation_to_as_many_as_allowed(tmp_path: Path):
    train = [problem(name, n) for name, n in (("a", 3), ("b", 2), ("c", 0), ("d", 1), ("e", 2))]
    test = [problem(name, n) for name, n in (("f", 7), ("g", 0), ("h", 1))]
    source = write(tmp_path / "all", train=train, test=test)
    assert write_easier(str(source), tmp_path / "easier", 2) == {"train": 3, "test": 3}
    for split, questions in (("train", "bde"), ("test", "fgh")):
        examples, dropped = load_examples(str(tmp_path / "easier"), split, 0)
        assert "".join(example.question for example in examples) == questions
        assert not dropped.total()
    assert examples[0].output == "So 6+1 = 7 “things”."  # of the last


def test_rows_that_training_would_leave_out_end_nothing(tmp_path: Path):
    odd = [{"question": "no answer"}, problem("half a \ud83d character", 1), problem("a", 1) | {"day": "2026-01-01"}]
    source = write(tmp_path / "all", train=odd, test=[{"question": "b", "answer": None}, problem("c", 1)])
    assert write_easier(str(source), tmp_path / "easier", 1) == {"train": 2, "test": 2}
    examples, dropped = load_examples(str(tmp_path / "easier"), "train", 0)
    assert [example.question for example in examples] == ["a"]
    assert dropped == {"half a character in the text": 1}


def test_what_cannot_be_read_or_written_is_said_in_one_line_and_nothing_is_written(tmp_path: Path, capsys):
    other = write(tmp_path / "other", train=[{"problem": "a"}], test=[{"problem": "b"}])
    half = write(tmp_path / "half", train=[problem("a", 1)], test=[{"problem": "b"}])
    hard = write(tmp_path / "hard", train=[problem("a", 3)], test=[problem("b", 1)])
    whole = write(tmp_path / "whole", train=[problem("a", 1), problem("b", 3)], test=[problem("c", 1)])
    before = (whole / "train.jsonl").read_bytes()
    for source, folder, why in (
        (other, tmp_path / "easier", "is not in GSM8K's form"),
        (half, tmp_path / "easier", "is not in GSM8K's form"),
        (hard, tmp_path / "easier", "has no training problem of 1 to 2 calculations"),
        (whole, whole, "(File exists): name a new folder"),
        (whole, whole / "train.jsonl", "(File exists): name a new folder"),
    ):
        assert main([str(folder), "--dataset", str(source), "--calculations", "2"]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("easier: ")
        assert why in lines[0]
    assert not (tmp_path / "easier").exists()
    assert (whole / "train.jsonl").read_bytes() == before
