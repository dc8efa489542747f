"""The scripts on machines as people have them, on files of somebody else: as processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.engine.models import load_model, save_model
from tests.helpers import change, tiny_model, word_tokenizer, write_sums
from tests.processes import ROOT, run

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path("theirs.txt").write_text("was here")
class Theirs(LlamaConfig):
    model_type = "theirs"
class TheirModel(LlamaForCausalLM):
    config_class = Theirs
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder, to be spoilt."""
    tokenizer = word_tokenizer()
    save_model(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model")
    return tmp_path / "model"


class TestCode:
    @pytest.mark.parametrize("known", [False, True], ids=["type of its own", "known type"])
    @pytest.mark.parametrize("script", ["train.py", "test.py"])
    def test_code_that_comes_with_a_model_is_not_run_whatever_standard_input_says(
        self, model: Path, tmp_path: Path, script: str, known: bool
    ) -> None:
        names = {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.TheirModel"}
        change(model / "config.json", auto_map=names, model_type="llama" if known else "theirs")
        (model / "theirs.py").write_text(CODE, encoding="utf-8")
        flags = ["--model", "model", "--dataset", "missing.jsonl", "--max_completion_tokens", "4"]
        done = run(script, *flags, cwd=tmp_path, stdin="y\ny\ny\n")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert ("missing.jsonl" if known else "Code that comes with a model is never run.") in done.stderr
        assert "Do you wish" not in done.stdout and not (tmp_path / "theirs.txt").exists()

    def test_a_kernel_that_a_config_names_is_not_fetched(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        change(model / "config.json", attn_implementation="somebody/kernel", _attn_implementation="somebody/kernel")
        loaded, _ = load_model(str(model), torch.device("cpu"))
        assert loaded.config._attn_implementation == "sdpa"


TINY = [
    "--model",
    "tiny",
    "--dataset",
    "synthetic",
    "--device",
    "cpu",
    "--num_samples",
    "2",
    "--max_completion_tokens",
    "4",
]
SHORT = "--preset tiny --cold_start_steps 0 --max_steps 1 --prompts_per_step 2 --group_size 2 --eval_samples 2"
SHORT = [*SHORT.split(), "--max_completion_tokens", "4", "--device", "cpu"]


class TestMachines:
    def test_escape_sequences_in_files_do_not_reach_the_terminal(self, model: Path, tmp_path: Path) -> None:
        evil = "\x1b]0;title\x07"
        (tmp_path / "rows.jsonl").write_text(json.dumps({evil: "q", "answer": "1"}))
        place = tmp_path / "checkpoints" / "step_000001"
        place.mkdir(parents=True)
        for name in ("trainer.json", "manifest.json"):
            (place / name).write_text(json.dumps({evil: [1], "settings": {"dtype": evil}}))
        change(model / "config.json", model_type=evil)
        done = [
            run("train.py", *SHORT, "--dataset", "rows.jsonl", "--checkpoint_dir", "other", cwd=tmp_path),
            run("train.py", *SHORT, "--model", "model", "--checkpoint_dir", "other", cwd=tmp_path),
            run("train.py", *SHORT, "--resume", cwd=tmp_path),
            run("test.py", "--checkpoint", str(place), cwd=tmp_path),
            run("test.py", cwd=tmp_path),
        ]
        for process in done:
            said = process.stderr + process.stdout
            assert process.returncode == 1 and "Traceback" not in said and "\x1b" not in said
        assert all(r"\x1b]0;title\x07" in process.stderr for process in done[:2])

    def test_without_git_a_run_and_an_evaluation_are_whole(self, tmp_path: Path) -> None:
        faults = "import os; os.environ['PATH'] = ''"
        assert run("train.py", *SHORT, cwd=tmp_path, faults=faults).returncode == 0
        assert '"commit": "unknown"' in (tmp_path / "logs" / "train.log").read_text(encoding="utf-8")
        done = run("test.py", *TINY, "--interactive", "false", "--output", "out.json", cwd=tmp_path, faults=faults)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "out.json").read_text())["versions"]["commit"] == "unknown"

    @pytest.mark.parametrize(
        ("faults", "status"),
        [
            ("import os, sys; os.close(1); sys.stdout = None", 0),
            ("import os, sys; os.close(2); sys.stderr = None", 0),
            ("import sys; sys.stdout = open('/dev/full', 'w')", 1),
        ],
        ids=["stdout closed", "stderr closed", "stdout full"],
    )
    def test_whatever_becomes_of_the_streams_an_evaluation_is_in_its_file(
        self, tmp_path: Path, faults: str, status: int
    ) -> None:
        done = run("test.py", *TINY, "--output", "out.json", cwd=tmp_path, faults=faults)
        assert done.returncode == status and "Traceback" not in done.stderr
        if status:
            assert done.stderr.splitlines()[-1].startswith("test.py: Cannot write to standard output (No space left")
        assert json.loads((tmp_path / "out.json").read_text())["models"][0]["metrics"]["eval/samples"] == 2

    def test_half_a_character_in_a_column_is_an_escape_in_the_file_of_an_evaluation(self, tmp_path: Path) -> None:
        rows = [{"question": f"a {i}?", "answer": "#### 2", "source": "\ud83d x"} for i in range(2)]
        (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        flags = ("--dataset", "odd.jsonl", "--split", "train", "--output", "out.json")
        done = run("test.py", *TINY, *flags, cwd=tmp_path)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert json.loads((tmp_path / "out.json").read_text())["models"][0]["problems"][0]["columns"] == {
            "source": "\ud83d x"
        }

    def test_an_evaluation_is_shown_when_its_file_cannot_be_written(self, tmp_path: Path) -> None:
        done = run("test.py", *TINY, "--output", "/dev/full", cwd=tmp_path)
        assert done.returncode == 1 and "Cannot write '/dev/full'" in done.stderr.splitlines()[-1]
        assert "on 2 problems, with 95% intervals:" in done.stdout

    @pytest.mark.parametrize("script", ["train.py", "test.py"])
    def test_a_full_memory_is_one_line(self, tmp_path: Path, script: str) -> None:
        faults = "import src.data\ndef full(*_): raise MemoryError\nsrc.data.read_rows = full"
        done = run(script, *(SHORT if script == "train.py" else TINY), cwd=tmp_path, faults=faults)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"{script}: The memory is full")

    @pytest.mark.parametrize("script", ["train.py", "test.py"])
    def test_ctrl_c_during_the_imports_is_no_traceback(self, tmp_path: Path, script: str) -> None:
        (tmp_path / "tqdm.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
        )
        (tmp_path / "transformers.py").write_text("import tqdm")
        command = (
            "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
        )
        done = subprocess.run(
            [sys.executable, "-c", command, sys.executable, str(ROOT / script)],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (-signal.SIGINT, "")

    def test_data_that_were_here_are_not_asked_of_the_hub_on_resume(self, tmp_path: Path) -> None:
        write_sums(tmp_path / "mine")
        data = ["--dataset", "mine"]
        assert run("train.py", *SHORT, *data, cwd=tmp_path).returncode == 0
        (tmp_path / "mine").rename(tmp_path / "moved")
        faults = "import src.hub, src.rows; src.rows.hub_problem = lambda: print('asked')"
        flags = ["--resume", "--max_steps", "2"]
        done = run("train.py", *SHORT, *data, *flags, cwd=tmp_path, faults=faults)
        assert done.returncode == 1 and "asked" not in done.stdout
        assert "--dataset was './mine', and 'mine' is not here" in done.stderr.splitlines()[-1]
        done = run("test.py", "--num_samples", "2", cwd=tmp_path, faults=faults)
        assert done.returncode == 1 and "asked" not in done.stdout
        done = run("train.py", *SHORT, "--dataset", "moved/", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr  # their content is the same
