"""No test question enters training: neither as a supervised target nor as a prompt to sample from."""

import json
from pathlib import Path

import pytest

import train

TEST_QUESTIONS = [f"Tom has {n} apples and finds 4 more. How many apples does Tom have?" for n in range(6)]
TRAIN_QUESTIONS = [f"Ann has {n} pens and gives 1 to Ben. How many pens are left?" for n in range(6)]
LEAKED = [TEST_QUESTIONS[0], TEST_QUESTIONS[1].upper(), "  " + TEST_QUESTIONS[2].replace(" ", " \n ")]


def letters(question: str) -> str:
    return "".join(question.split()).casefold()


def write_data(folder: Path, **splits: list[str]) -> Path:
    for split, questions in splits.items():
        rows = [{"question": question, "answer": "3+4 = 7.\n#### 7"} for question in questions]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def argv(tmp_path: Path, data: Path, *more: str) -> list[str]:
    flags = ["--preset", "tiny", "--dataset", str(data), "--device", "cpu", "--max_completion_tokens", "4"]
    flags += [
        "--checkpoint_dir",
        str(tmp_path / "checkpoints"),
        "--log_dir",
        str(tmp_path / "logs"),
        "--eval_every",
        "0",
    ]
    flags += ["--cold_start_steps", "6", "--cold_start_batch_size", "3", "--max_steps", "6", "--prompts_per_step", "2"]
    return [*flags, "--group_size", "2", "--save_every", "0", "--sample_every", "0", *more]


def test_whatever_a_run_learns_from_is_no_test_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[str] = []
    target_batch, step = train.target_batch, train.GRPOTrainer.step

    def seen_targets(tokenizer, examples, *rest):
        learned.extend(example.question for example in examples)
        return target_batch(tokenizer, examples, *rest)

    def seen_step(self, number, examples, more):
        learned.extend(example.question for example in examples)
        return step(self, number, examples, more)

    monkeypatch.setattr(train, "target_batch", seen_targets)
    monkeypatch.setattr(train.GRPOTrainer, "step", seen_step)
    data = write_data(tmp_path, train=LEAKED[:1] + TRAIN_QUESTIONS + LEAKED[1:], test=TEST_QUESTIONS)
    assert train.main(argv(tmp_path, data)) == 0

    assert len(learned) == 6 * 3 + 6 * 2
    assert {letters(q) for q in learned} == {letters(q) for q in TRAIN_QUESTIONS}
    log = (tmp_path / "logs" / "train.log").read_text(encoding="utf-8")
    assert "3 training problems left out: their questions are test questions" in log
    lines = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text("utf-8").splitlines()]
    evaluated = [(row["phase"], row["step"], row["eval/samples"]) for row in lines if "eval/samples" in row]
    assert evaluated == [("eval", at, 6) for at in (0, 3, 6)]  # three steps are an epoch
    assert "accuracy: 0.0% before, 0.0% at best (step 0), 0.0% at the end\n" in log


def test_a_run_with_nothing_else_to_learn_from_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path, train=LEAKED, test=TEST_QUESTIONS)
    assert train.main(argv(tmp_path, data)) == 1
    assert "Every training problem is a test problem, too" in capsys.readouterr().err.splitlines()[-1]
