"""docs/custom.md, as its reader would use it: its rewards, its commands (shortened), its data sets, and its faults."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from src import evaluation
from src.data import load_examples
from src.grpo import GRPOConfig
from src.settings import TrainConfig, parse_flags
from tests.helpers import load_script
from tests.test_scripts import ROOT, SHORT, metrics, run, weights

DOCS = (ROOT / "docs" / "custom.md").read_text(encoding="utf-8")
REWARDS = "\n\n".join(re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL))
COMMANDS = re.findall(r"^python train\.py (.*--rewards .*)$", DOCS, re.MULTILINE)
DATA_SETS = {
    path: shlex.split(flags.strip(" `"))
    for path, flags in re.findall(r"^\| [\w ]+ \| (tests/data/\S+) \| (.*?) ?\|$", DOCS, re.MULTILINE)
}
QUICK = [*SHORT, "--eval_every", "0", "--save_every", "0", "--eval_samples", "2"]
ONE = ["--no_interactive", "--num_samples", "1"]
MENDED = "def fragile(completion, answer): return len(completion) / 100"
BROKEN = """
calls = 0
def fragile(completion, answer):
    global calls
    calls += 1
    return len(completion) / (100 if calls < {} else 0)
"""


train_script, test_script = load_script("train"), load_script("test")


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with the rewards of the page in my_rewards.py."""
    (tmp_path / "my_rewards.py").write_text(REWARDS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def in_process(*flags: str) -> None:
    assert train_script.main([*QUICK, "--max_steps", "1", *flags]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_run_and_each_reward_has_its_curves(cwd: Path, command: str) -> None:
    flags = shlex.split(command)
    in_process(*flags)
    names = [item.split("=")[0] for item in flags[-1].partition(":")[2].split(",")]
    names = ["answer_accuracy" if name == "accuracy" else name for name in names]
    for phase, prefix in (("grpo", "reward/"), ("eval", "eval/reward/")):
        [line, *_] = [line for line in metrics(cwd) if line["phase"] == phase]
        assert [key.removeprefix(prefix) for key in line if key.startswith(prefix)] == names
    assert len(COMMANDS) == 2


def test_the_page_s_data_sets_are_those_in_the_folder() -> None:
    assert {ROOT / path for path in DATA_SETS} == set((ROOT / "tests" / "data").iterdir())


@pytest.mark.parametrize(
    ("path", "answers", "question", "reasoning", "column"),
    [
        ("gsm8k_like", ["24", "1,080", "7.50", "-5"], "A baker", "4 trays of 6 rolls are 4*6=24 rolls.", {}),
        (
            "math_like.jsonl",
            [r"\frac{3}{4}", "4", "-5", "x^{2}+2x+1"],
            "Simplify",
            r"Dividing both by 2 gives $\frac{6}{8} = \frac{3}{4}$.",
            {"level": "Level 1", "type": "Prealgebra"},
        ),
        (
            "svamp_like.csv",
            ["3", "72", "4.5", "17"],
            "Nora has 8 kites and 5 balls. How many more kites than balls does she have?",
            "",
            {"Type": "Subtraction"},
        ),
        ("asdiv_like.csv", ["9", "15"], "Seven red apples", "", {"Solution-Type": "Addition"}),
        ("plain.jsonl", ["56", "99"], "What is 7 times 8?", "", {}),
        ("choices.jsonl", ["B", "A"], "What is 7 + 8?", "7 + 8 = 15. The", {}),
    ],
)
def test_a_data_set_of_the_page_is_read_with_the_flags_that_stand_there_and_trained_on(
    cwd: Path, path: str, answers: list[str], question: str, reasoning: str, column: dict[str, str]
) -> None:
    dataset = ["--dataset", str(ROOT / "tests/data" / path), *DATA_SETS[f"tests/data/{path}"]]
    config, _ = parse_flags((TrainConfig, GRPOConfig), dataset)
    columns = (config.question_column, config.answer_column, config.answer_pattern)
    examples, dropped = load_examples(config.dataset, "train", 0, *columns)
    assert [example.answer for example in examples] == answers and not dropped
    assert examples[0].question.startswith(question) and examples[0].reasoning == reasoning
    assert column.items() <= examples[0].columns.items()
    in_process(
        *dataset,
        "--max_prompt_tokens",
        "2000",
        "--cold_start_steps",
        "1" if reasoning else "0",
        "--cold_start_batch_size",
        "1",
    )


def test_a_cold_start_without_a_target_is_refused_in_one_line(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--dataset", str(ROOT / "tests/data/plain.jsonl"), "--max_prompt_tokens", "2000"]
    assert train_script.main([*QUICK, *data]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "--cold_start_steps needs answers with reasoning" in errors[-1]
    assert sum("2 training problems have no reasoning" in line for line in errors) == 1


def test_a_cold_start_leaves_out_the_rows_without_reasoning(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"q{n}", "answer": "#### 1" if n % 2 else "It is 1.\n#### 1"} for n in range(20)]
    Path("all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    seen = []
    real = train_script.target_batch
    monkeypatch.setattr(train_script, "target_batch", lambda t, e, *rest: seen.extend(e) or real(t, e, *rest))
    in_process("--dataset", "all.jsonl", "--cold_start_steps", "3", "--cold_start_batch_size", "5")
    assert len(seen) == 15 and all(example.reasoning for example in seen)
    assert len({example.question for example in seen}) > 5


def test_test_py_takes_the_data_flags_and_the_system_prompt_from_the_checkpoint_but_no_code(
    cwd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompt.txt").write_text("Answer within <reasoning></reasoning> <output></output> <answer></answer>.")
    data = ["--dataset", str(ROOT / "tests/data/svamp_like.csv"), "--question_column", "Body", "Question"]
    data += ["--answer_column", "Answer", "--system_prompt_file", "prompt.txt", "--cold_start_steps", "0"]
    Path("my_rewards.py").write_text("open('has run', 'a').write('x')\ndef f(completion): return 0.25\n")
    in_process(*data, "--rewards", "my_rewards.py:f")
    Path("has run").unlink(), Path("prompt.txt").unlink()
    prompts, encode = [], evaluation.encode_prompts
    monkeypatch.setattr(
        evaluation, "encode_prompts", lambda t, q, system: prompts.append(system) or encode(t, q, system)
    )
    monkeypatch.setattr(sys, "stdin", None)
    assert test_script.main([*ONE, "--output", "one.json"]) == 0
    said = capsys.readouterr()
    assert "trained with --rewards my_rewards.py:f: give it again" in said.err
    assert not Path("has run").exists() and "answer_accuracy" in said.out
    report = json.loads(Path("one.json").read_text(encoding="utf-8"))
    given = {"question_column": ["Body", "Question"], "answer_column": "Answer", "answer_pattern": "gsm8k"}
    assert given.items() <= report["settings"].items()
    assert report["models"][0]["problems"][0]["question"].startswith("A shelf holds 40 jars and 16 were sold. How")
    assert prompts == ["Answer within <reasoning></reasoning> <output></output> <answer></answer>."]
    assert test_script.main([*ONE, "--rewards", "my_rewards.py:f=2,accuracy"]) == 0
    assert "f 0.25" in capsys.readouterr().out and Path("has run").exists()


def test_a_reward_that_fails_on_the_way_loses_no_work(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken in the middle of step 3; mended and resumed, the run ends like one whose reward was never broken."""
    flags = [*QUICK, "--rewards", "my_rewards.py:fragile,accuracy=2", "--kl_coef", "0.1"]
    earlier = 2 + 2 + 2 * 8  # calls: tried out, validation, two steps of 8 completions
    Path("my_rewards.py").write_text(BROKEN.format(earlier + 3))
    line = last_line(run("train.py", *flags, cwd=cwd))
    assert "After grpo step 2: The reward 'fragile' raised ZeroDivisionError (division by zero, my_rewards.py" in line
    assert "for the completion " in line and "--resume with --allow_changes true" in line
    log = Path("logs/train.log").read_text(encoding="utf-8")
    assert "saved checkpoints/step_000002" in log and "Traceback" in log
    Path("my_rewards.py").write_text(MENDED)
    assert train_script.main([*flags, "--resume"]) == 1
    assert "rewards (its content)" in capsys.readouterr().err.splitlines()[-1]
    assert train_script.main([*flags, "--resume", "--allow_changes", "true"]) == 0
    assert train_script.main([*flags, "--log_dir", "whole/logs", "--checkpoint_dir", "whole/checkpoints"]) == 0
    assert metrics(cwd) == metrics(cwd / "whole") and weights(cwd) == weights(cwd / "whole")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rewards", "nowhere.py:f"], "The rewards file 'nowhere.py' cannot be run: FileNotFoundError"),
        (["--rewards", "my_rewards.py:no_such"], "names 'no_such', which is no function in 'my_rewards.py'"),
        (["--rewards", "formatting", "--reward_weights", "1", "1", "1", "1"], "leave --reward_weights out"),
        (["--answer_pattern", "("], "--answer_pattern '(' is no regular expression"),
        (["--question_column", "Body"], "has no columns Body and answer (it has question, answer): name its own"),
        (["--system_prompt_file", "nowhere.txt"], "Cannot read --system_prompt_file 'nowhere.txt'"),
    ],
)
def test_what_a_user_gets_wrong_ends_in_one_clear_line(
    cwd: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert train_script.main([*QUICK, *flags]) == 1
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path("checkpoints").glob("*/model.safetensors"))
