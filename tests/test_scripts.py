"""train.py and test.py, run as a user runs them: as processes, on the embedded tiny model, shortened."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.processes import ROOT, Process, run

SHORT = ["--preset", "tiny", "--cold_start_steps", "4", "--cold_start_batch_size", "8", "--max_steps", "4"]
SHORT += ["--prompts_per_step", "2", "--group_size", "4", "--max_completion_tokens", "12", "--eval_samples", "6"]
SHORT += [
    "--save_every",
    "2",
    "--keep_last",
    "0",
    "--eval_every",
    "2",
    "--sample_every",
    "1",
    "--device",
    "cpu",
    "--learning_rate",
    "1e-4",
]
CLOCK = ("seconds", "tokens_per_second", "peak_memory")


def train(cwd: Path, *flags: str) -> Process:
    done = run("train.py", *SHORT, *flags, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def metrics(cwd: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what a clock measured."""
    lines = (cwd / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(CLOCK)} for line in lines]


def weights(cwd: Path) -> bytes:
    return (cwd / "checkpoints" / "final" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole short run."""
    cwd = tmp_path_factory.mktemp("a run with späces")
    command = [sys.executable, str(ROOT / "train.py"), *SHORT]
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return cwd


def test_a_run_leaves_checkpoints_that_transformers_opens(finished: Path) -> None:
    names = {path.name for path in (finished / "checkpoints").iterdir() if path.is_dir()}
    assert names == {"cold_start", "cold_start_000002", "cold_start_000004", "step_000002", "step_000004", "final"}
    AutoModelForCausalLM.from_pretrained(finished / "checkpoints" / "final")
    tokenizer = AutoTokenizer.from_pretrained(finished / "checkpoints" / "final")
    assert tokenizer.decode(tokenizer("Tom has 3+4=7 apples.")["input_ids"]) == "Tom has 3+4=7 apples."


def test_a_run_logs_every_step_of_every_phase_in_order(finished: Path) -> None:
    lines = [(line["phase"], line["step"]) for line in metrics(finished)]
    grpo = [("eval", 0), ("grpo", 1), ("grpo", 2), ("eval", 2), ("grpo", 3), ("grpo", 4), ("eval", 4)]
    assert lines == [("cold_start", step) for step in (1, 2, 3, 4)] + grpo
    log = (finished / "logs" / "train.log").read_text(encoding="utf-8")
    assert '"seed": 0' in log and '"torch"' in log and "sample of step 1" in log


def test_a_run_ends_with_its_results_and_the_next_command(finished: Path) -> None:
    end = (finished / "logs" / "train.log").read_text(encoding="utf-8").split(" done\n")[1].splitlines()
    accuracies = {line["step"]: line["eval/accuracy"] for line in metrics(finished) if line["phase"] == "eval"}
    best = max(accuracies, key=accuracies.get)
    before, highest, last = (f"{accuracies[step]:.1%}" for step in (0, best, 4))
    assert end[0] == f"accuracy: {before} before, {highest} at best (step {best}), {last} at the end"
    assert end[1:3] == ["checkpoint: checkpoints/final", "next: python test.py --checkpoint checkpoints/final"]


def test_a_redirected_run_writes_whole_lines_and_no_bar(tmp_path: Path) -> None:
    done = train(tmp_path, "--tensorboard", "true")
    assert done.stdout == ""
    assert "\r" not in done.stderr and "\x1b" not in done.stderr and "|" not in done.stderr
    for line in done.stderr.split(" done\n")[0].splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line + " "), line
    assert any((tmp_path / "logs" / "tensorboard").iterdir())


def test_two_runs_with_one_seed_write_identical_metrics_and_weights(finished: Path, tmp_path: Path) -> None:
    train(tmp_path)
    assert metrics(tmp_path) == metrics(finished)
    assert weights(tmp_path) == weights(finished)


def test_another_seed_gives_another_run(finished: Path, tmp_path: Path) -> None:
    train(tmp_path, "--seed", "1")
    assert metrics(tmp_path) != metrics(finished)


@pytest.mark.parametrize("start", ["cold_start_000002", "cold_start_000004", "cold_start", "step_000002"])
def test_a_resumed_run_ends_exactly_like_an_unbroken_one(finished: Path, tmp_path: Path, start: str) -> None:
    for folder in ("logs", "checkpoints"):
        subprocess.run(["cp", "-r", str(finished / folder), str(tmp_path)], check=True)
    train(tmp_path, "--resume", f"checkpoints/{start}")
    assert metrics(tmp_path) == metrics(finished)
    assert weights(tmp_path) == weights(finished)


def test_a_refused_resume_leaves_the_logs_as_they_were(finished: Path) -> None:
    files = [finished / "logs" / name for name in ("metrics.jsonl", "samples.jsonl", "settings.json")]
    before = [file.read_bytes() for file in files]
    done = run("train.py", *SHORT, "--temperature", "0.5", "--resume", "checkpoints/step_000002", cwd=finished)
    assert done.returncode == 1
    assert "temperature was 1.0, is 0.5" in done.stderr.splitlines()[-1]
    assert [file.read_bytes() for file in files] == before


def test_a_changed_setting_is_refused_by_name_on_resume(finished: Path) -> None:
    done = run("train.py", *SHORT, "--learning_rate", "0.5", "--resume", cwd=finished)
    assert done.returncode == 1
    assert "learning_rate was 0.0001, is 0.5" in done.stderr.splitlines()[-1]


def test_test_py_scores_the_newest_checkpoint_and_answers_what_is_piped_in(finished: Path) -> None:
    question = "Tom has 3 apples and finds 4 more. How many apples does Tom have?"
    done = run("test.py", "--num_samples", "3", cwd=finished, stdin=f"{question}\n\nexit\nnot reached\n")
    assert done.returncode == 0, done.stderr
    assert "checkpoint: checkpoints/final" in done.stderr
    assert done.stdout.count("question:") == done.stdout.count("truth:") == done.stdout.count("rewards:") == 3
    assert "on 3 problems" in done.stdout and "without a calculation in the reasoning" in done.stdout


@pytest.mark.parametrize("flags", [[], ["--k", "3", "--compare", "checkpoints/cold_start"]])
def test_the_same_seed_gives_the_same_evaluation_file(finished: Path, flags: list[str]) -> None:
    command = [*flags, "--num_samples", "5", "--interactive", "false", "--output"]
    done = [run("test.py", *command, name, cwd=finished) for name in ("one.json", "two.json")]
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    assert (finished / "one.json").read_bytes() == (finished / "two.json").read_bytes()
    report = json.loads((finished / "one.json").read_text(encoding="utf-8"))
    for model in report["models"]:
        assert [len(problem["completions"]) for problem in model["problems"]] == [3 if flags else 1] * 5
        rewards = [c["rewards"]["answer_accuracy"] for p in model["problems"] for c in p["completions"]]
        assert model["metrics"]["eval/accuracy"] == sum(rewards) / len(rewards)
    assert [model["model"] for model in report["models"]] == ["checkpoints/final", "checkpoints/cold_start"][
        : 1 + bool(flags)
    ]
    assert set(report["differences"]) == (
        {"accuracy", "accuracy_lenient", "format_rate", "pass@2", "pass@3", "majority@3"} if flags else set()
    )
    assert ("better than checkpoints/cold_start" in done[0].stdout) == bool(flags)
    assert " tokens, " in done[0].stdout


def test_a_model_compared_with_itself_differs_in_nothing(finished: Path) -> None:
    done = run(
        "test.py", "--num_samples", "4", "--compare", "checkpoints/final", "--interactive", "false", cwd=finished
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.partition("better than")[2].split("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["accuracy", "accuracy_lenient", "format_rate"]
    assert all(" +0.0 " in line and line.endswith("p = 1; problems: 0 better, 0 worse") for line in lines)


def test_test_py_says_which_true_answers_are_no_bare_numbers(finished: Path, tmp_path: Path) -> None:
    rows = [{"question": "Tom has 3 stamps and finds 2 more. How many?", "answer": "3 + 2 = 5\n#### 5 stamps"}]
    (tmp_path / "stamps.jsonl").write_text(json.dumps(rows), encoding="utf-8")
    flags = ["--dataset", str(tmp_path / "stamps.jsonl"), "--num_samples", "0", "--interactive", "false"]
    done = run("test.py", *flags, cwd=finished)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 final answers are no bare numbers, such as '5 stamps'" in done.stderr


def test_ask_answers_once(finished: Path) -> None:
    done = run("test.py", "--ask", "Ann has 2 boxes of 3 pens. How many?", cwd=finished)
    assert done.returncode == 0
    assert "question:" not in done.stdout


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("train.py", ["--group_size", "1"], "--group_size is 1: give 2 or more"),
        ("train.py", ["--learning_rate", "-1"], "--learning_rate is -1.0"),
        ("train.py", ["--no_such_flag", "3"], "--no_such_flag"),
        ("train.py", ["--preset", "huge"], "--preset is huge: choose one of default, tiny."),
        ("train.py", ["--reward_weights", "1", "2"], "--reward_weights is [1.0, 2.0]: give 4"),
        ("train.py", ["--config", "missing.yaml"], "missing.yaml"),
        ("train.py", ["--preset", "tiny", "--dataset", "./nowhere.jsonl"], "nowhere.jsonl"),
        ("train.py", ["--preset", "tiny", "--prompts_per_step", "5000"], "5000"),
        ("train.py", ["--preset", "tiny", "--resume"], "no whole checkpoint"),
        ("train.py", ["--preset", "tiny", "--resume", "nowhere"], "nowhere"),
        ("train.py", ["--preset", "tiny", "--model", "./empty", "--dataset", "synthetic"], "empty"),
        ("train.py", ["--preset", "tiny", "--device", "tpu9"], "tpu9"),
        ("test.py", [], "There is no checkpoint in 'checkpoints' yet"),
        ("test.py", ["--checkpoint", "nowhere"], "nowhere"),
        ("test.py", ["--num_samples", "-1"], "--num_samples is -1"),
        ("test.py", ["--k", "0"], "--k is 0: give 1 or more"),
        ("test.py", ["--k", "2", "--temperature", "0"], "--k 2 samples, and --temperature 0 does not"),
        ("test.py", ["--temperature", "-1"], "--temperature is -1"),
        ("test.py", ["--output", "a" * 300], "There is no checkpoint in 'checkpoints' yet"),
        ("test.py", ["--checkpoint", "a" * 300], "There is no checkpoint folder"),
        ("test.py", ["--output", "nowhere/a.json"], "--output 'nowhere/a.json' is no file in a folder that exists"),
        ("test.py", ["--model", "tiny", "--compare", "./empty"], "empty"),
    ],
)
def test_what_a_user_gets_wrong_ends_in_one_clear_line(
    tmp_path: Path, script: str, flags: list[str], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    done = run(script, *flags, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert words in done.stderr.splitlines()[-1]
