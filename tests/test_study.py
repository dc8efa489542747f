"""The study of arms: which runs it starts and from where, what it says of one that fails, and its table."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import study

TRAIN = """
import json, sys
from pathlib import Path

place = Path(sys.argv[sys.argv.index("--checkpoint_dir") + 1])
place.mkdir(parents=True, exist_ok=True)
with open(place.parent.parent / "calls.jsonl", "a") as file:
    file.write(json.dumps([place.parent.name, *sys.argv[1:]]) + "\\n")
if "--fail" in sys.argv and place.parent.name != "start-3":
    sys.exit("a warning\\ntrain.py: --preset is tny: choose one.")
for name in ("cold_start", "final"):
    (place / name).mkdir()
    (place / name / "manifest.json").touch()
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A train.py that notes how it was called, and how it has been."""
    (tmp_path / "train.py").write_text(TRAIN, encoding="utf-8")
    monkeypatch.setattr(study, "ROOT", tmp_path)

    def read() -> list[list[str]]:
        lines = (tmp_path / "runs" / "calls.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return read


def test_arms_begin_from_the_cold_start_of_their_seed_and_what_is_done_stays(calls, tmp_path: Path) -> None:
    cold = str(tmp_path / "runs" / "start-3" / "checkpoints" / "cold_start")
    for _ in range(2):
        study.run(tmp_path / "runs", ["right", "undivided"], [3], ["--lr", "1"])
    assert [call[0] for call in calls()] == ["start-3", "right-3", "undivided-3"]
    assert all(call[call.index("--resume") + 1] == cold for call in calls()[1:])


def test_an_arm_that_failed_before_its_first_save_is_said_and_begins_from_there_again(calls, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"right-3' ended with 1: train\.py: --preset is tny: choose one\.$"):
            study.run(tmp_path / "runs", ["right"], [3], ["--fail"])
    assert ["--resume" in call for call in calls()] == [False, True, True]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([2.0], "2.0"),
        ([1.0, 2.0, 3.0], "+2.0 (-0.5 to +4.5)"),  # 4.303 / sqrt(3) = 2.484
        ([1.0] * 11, "+1.0 (+1.0 to +1.0)"),
    ],
)
def test_means_have_student_s_interval(values: list[float], text: str) -> None:
    assert study.interval(values) == text


def test_the_table_compares_arms_by_the_seeds_that_both_have(tmp_path: Path, capsys, monkeypatch) -> None:
    for name, after in (("right-0", 0.5), ("right-1", 0.7), ("placebo-1", 0.1), ("right-old", 0.9), ("start-0", 0.9)):
        (tmp_path / name / "logs").mkdir(parents=True)
        shown = dict.fromkeys(study.SHOWN, 0.0)
        rows = [{"phase": "eval", **shown, "eval/accuracy": value} for value in (0.2, after)]
        rows += [{"phase": "grpo", "step": step, **dict.fromkeys(study.LAST, step)} for step in (1, 2, 3, 4, 5)]
        (tmp_path / name / "logs" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["study.py", str(tmp_path), "--report"])
    study.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| right | 2 | 5 | 20.0 -> 60.0 |") and lines[2].endswith("| 5.00 | 5.00 | 5.00 |")
    assert lines[3].startswith("| placebo | 1 | 5 | 20.0 -> 10.0 |")
    assert lines[5] == "placebo: strict accuracy -10.0 points; against right -60.0"
