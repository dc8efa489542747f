"""Faults of people, clocks and machines, done to a running train.py or test.py: nobody's work is lost or mistaken."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.run.checkpoint import copy_checkpoint, damage
from tests import processes
from tests import test_reliability as reliability
from tests.helpers import write_sums
from tests.test_reliability import SHORT, last_line, metrics, names, result, run, spoil, whole_run

finished, copied = reliability.finished, reliability.copied


def refused(cwd: Path, *flags: str, words: str, faults: str = "") -> str:
    """The one line that a run ends with before its first step, which has these words in it."""
    logs = cwd / "logs" / "metrics.jsonl"
    before = logs.read_bytes() if logs.exists() else None
    done = run(*SHORT, *flags, cwd=cwd, faults=faults)
    assert done.returncode == 1 and words in last_line(done), done.stderr
    assert (logs.read_bytes() if logs.exists() else None) == before
    return last_line(done)


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def resign(folder: Path, name: str, data: bytes) -> None:
    """Change a file of a checkpoint so that its checksum is right."""
    (folder / name).unlink()
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest[name] = [len(data), hashlib.sha256(data).hexdigest()]
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


class TestWhatIsNotOurs:
    def novel(path: Path) -> None:
        path.mkdir()
        (path / "chapter").write_text("Call me Ishmael.", encoding="utf-8")

    def link(path: Path) -> None:
        path.symlink_to("../logs")

    def file(path: Path) -> None:
        path.write_bytes(b"mine")

    def nowhere(path: Path) -> None:
        path.symlink_to("nowhere")

    @pytest.mark.parametrize(
        ("name", "make"),
        [
            *(("final", novel), ("cold_start", novel), (".unfinished-final", novel), ("best", link)),
            *(("epoch_1", file), (".replaced-best", file), ("step_000002", nowhere)),
        ],
    )
    def test_it_is_refused_by_name_before_training_and_stays(self, tmp_path: Path, name: str, make) -> None:
        (tmp_path / "checkpoints").mkdir()
        make(tmp_path / "checkpoints" / name)
        before = content(tmp_path / "checkpoints")
        refused(tmp_path, words=f"'checkpoints/{name}' was not written by this program")
        assert content(tmp_path / "checkpoints") == before
        assert os.path.lexists(tmp_path / "checkpoints" / name)

    def test_what_only_looks_like_debris_is_left_alone_and_so_is_what_comes_up_during_the_run(self, tmp_path) -> None:
        (tmp_path / "checkpoints").mkdir()
        TestWhatIsNotOurs.novel(tmp_path / "checkpoints" / ".unfinished-novel")
        make = "import os; os.makedirs('checkpoints/step_000002/mine', exist_ok=True)"
        done = run(*SHORT, cwd=tmp_path, faults=spoil("cold_start", "supervised_gradients", "[1]", make))
        assert done.returncode == 0 and "what is there was not written by this program" in done.stderr
        assert (tmp_path / "checkpoints" / "step_000002" / "mine").is_dir()
        assert (tmp_path / "checkpoints" / ".unfinished-novel" / "chapter").exists()
        assert {"step_000004", "final"} <= names(tmp_path)


class TestAnotherRunsCheckpoints:
    def test_a_new_run_is_refused_and_told_which_to_go_on_from(self, copied: Path) -> None:
        before = content(copied / "checkpoints")
        line = refused(copied, words="'checkpoints' holds checkpoints of another run: pass --resume checkpoints/final")
        assert "--checkpoint_dir" in line and "--replace" in line
        assert content(copied / "checkpoints") == before

    def test_told_to_replace_them_it_does_once_it_has_saved_and_leaves_copies_alone(self, copied: Path) -> None:
        folder = copied / "checkpoints"
        copy_checkpoint(folder / "step_000002", folder / "mine")
        flags = [*SHORT, "--replace", "--seed", "1", "--save_every", "0", "--cold_start_steps", "0"]
        kill = spoil("grpo", "grpo_loss", "[2]", "import os; os.kill(os.getpid(), 9)")
        assert run(*flags, cwd=copied, faults=kill).returncode == -signal.SIGKILL
        assert damage(folder / "final") is None and damage(folder / "step_000002") is None
        done = run(*flags, cwd=copied)
        assert done.returncode == 0 and "removed checkpoints/step_000004, which is another run's" in done.stderr
        assert names(copied) == {"epoch_1", "final", "mine"} and damage(folder / "mine") is None


class TestOrder:
    def test_a_clock_set_back_changes_nothing(self, finished, tmp_path: Path) -> None:
        back = "import itertools, time; times = itertools.count(2e9, -1e6); time.time = lambda: next(times)\n"
        flags = [*SHORT, "--save_every", "1", "--keep_last", "2"]
        stop = spoil("grpo", "grpo_loss", "[4]", "import os; os.kill(os.getpid(), 9)")
        assert run(*flags, cwd=tmp_path, faults=back + stop).returncode == -signal.SIGKILL
        assert names(tmp_path) == {"cold_start", "step_000002", "step_000003"}
        done = run(*flags, "--resume", cwd=tmp_path, faults=back)
        assert "resuming from checkpoints/step_000003: grpo step 3" in done.stderr and result(tmp_path) == result(
            finished
        )

    def test_keep_last_leaves_copies_what_is_ahead_and_what_was_resumed_and_then_the_newest_is_the_latest_saved(
        self, finished, copied: Path
    ) -> None:
        folder = copied / "checkpoints"
        copy_checkpoint(folder / "step_000002", folder / "my best one")
        flags = [*SHORT, "--save_every", "1", "--keep_last", "1", "--eval_every", "2"]
        done = run(*flags, "--max_steps", "3", "--resume", "checkpoints/step_000002", cwd=copied)
        assert "removed checkpoints/cold_start_000002, since --keep_last is 1" in done.stderr
        steps = {"step_000002", "step_000003", "step_000004", "epoch_1"}
        assert names(copied) == steps | {"cold_start", "final", "my best one"}
        done = run(*flags, "--resume", cwd=copied)
        assert "resuming from checkpoints/final: grpo step 3" in done.stderr
        assert result(copied)[:2] == result(finished)[:2]


class TestPeople:
    def test_an_edited_card_damages_nothing_and_no_other_name(self, copied: Path) -> None:
        card = copied / "checkpoints" / "final" / "README.md"
        card.write_text(card.read_text(encoding="utf-8") + "\nMy words.\n", encoding="utf-8")
        assert damage(card.parent) is None
        assert "My words" not in (copied / "checkpoints" / "step_000004" / "README.md").read_text(encoding="utf-8")
        done = run(*SHORT, "--resume", cwd=copied)
        assert "resuming from checkpoints/final" in done.stderr and "passing over" not in done.stderr
        card.unlink()
        whole_run(copied, *SHORT, "--resume", "checkpoints/final", "--checkpoint_dir", "other")
        assert damage(copied / "other" / "final") is None

    def test_another_path_to_the_same_data_is_no_change_other_test_problems_or_reward_code_are(self, copied) -> None:
        write_sums(copied / "data")
        for path in ("data/", "./data", str(copied / "data")):
            done = run(*SHORT, "--dataset", path, "--resume", cwd=copied)
            assert done.returncode == 0, done.stderr
        other = "import src.script as t; t.fingerprint_code = lambda *modules: 'other'"
        refused(copied, "--resume", words="reward code (its content)", faults=other)
        test = copied / "data" / "test.jsonl"
        test.write_text(test.read_text(encoding="utf-8").replace("22", "23"), encoding="utf-8")
        refused(copied, "--resume", words="test data (its content)")
        whole_run(copied, *SHORT, "--resume", "--allow_changes", "true")


class TestLogs:
    def test_those_of_another_run_are_set_aside(self, copied: Path, tmp_path_factory) -> None:
        other = whole_run(tmp_path_factory.mktemp("other"), *SHORT, "--seed", "1")
        before = content(other / "logs")
        where = ["--checkpoint_dir", "new", "--log_dir", str(other / "logs")]
        whole_run(copied, *SHORT, *where, "--resume", "checkpoints/step_000002")
        for name in ("metrics.{}jsonl", "samples.{}jsonl", "settings.{}json"):
            assert (other / "logs" / name.format("1.")).read_bytes() == before[name.format("")]

    def test_what_is_cut_off_is_kept_beside_and_an_edited_line_costs_that_line(self, finished, copied) -> None:
        path = copied / "logs" / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        lines[3] = lines[3].replace(b"{", b"{ an edit that makes it longer", 1)
        path.write_bytes(b"".join(lines))
        whole_run(copied, *SHORT, "--resume", "checkpoints/step_000002")
        after = path.read_bytes().splitlines(keepends=True)
        assert len(after) == len(lines) and after[:7] == lines[:7]
        assert (copied / "logs" / "metrics.cut.jsonl").read_bytes() == b"".join(lines[7:])
        whole = [row for i, row in enumerate(metrics(finished)) if i != 3]
        assert [json.loads(line)["step"] for i, line in enumerate(after) if i != 3] == [row["step"] for row in whole]


WRONG = "master/model.norm.weight is missing, or of another shape or type"


class TestHalfRightStates:
    def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            found = load_file(folder / "trainer.safetensors")
            change(found)
            save_file(found, folder / "new")
            resign(folder, "trainer.safetensors", (folder / "new").read_bytes())
            (folder / "new").unlink()

        return apply

    def state(**entries: object) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            found = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
            found["progress"] |= entries.pop("progress", {})
            resign(folder, "trainer.json", json.dumps(found | entries).encode())

        return apply

    @pytest.mark.parametrize(
        ("spoilt", "words"),
        [
            (tensors(lambda t: t.update({"master/model.norm.weight": torch.ones(1)})), WRONG),
            (tensors(lambda t: t.update({"master/model.norm.weight": t["master/model.norm.weight"].half()})), WRONG),
            (tensors(lambda t: t.pop("master/model.norm.weight")), WRONG),
            (
                tensors(lambda t: t["adam/exp_avg_sq/model.norm.weight"].fill_(float("nan"))),
                "numbers that are not finite",
            ),
            (state(reference=None), "cold_start' is not what 'checkpoints/step_000002' says it began from"),
            (state(progress={"step": "3"}), "step is '3'"),
        ],
    )
    def test_they_are_refused_before_a_line_of_metrics_is_written(self, copied: Path, spoilt, words: str) -> None:
        spoilt(copied / "checkpoints" / "step_000002")
        assert damage(copied / "checkpoints" / "step_000002") is None or "step is" in words
        refused(copied, "--resume", "checkpoints/step_000002", words=words)


class TestReaders:
    def test_test_py_checks_a_named_checkpoint_too(self, copied: Path) -> None:
        path = copied / "checkpoints" / "final" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        done = processes.run("test.py", "--checkpoint", "checkpoints/final", "--ask", "1+1?", cwd=copied)
        assert done.returncode == 1 and "model.safetensors is damaged" in last_line(done)


class TestRehearsal:
    @pytest.mark.parametrize(
        ("folder", "faults", "words"),
        [
            (os.fsdecode(b"caf\xe9"), "", "surrogates not allowed"),
            (
                "full",
                "import shutil; from types import SimpleNamespace as N; shutil.disk_usage = lambda p: N(free=9)",
                "0.000 GB are free",
            ),
            (
                "cards",
                "import src.model_card as m\ndef write_card(*a): raise KeyError('x')\nm.write_card = write_card",
                "'x'",
            ),
        ],
    )
    def test_what_could_not_be_saved_is_said_before_training(self, tmp_path: Path, folder, faults, words) -> None:
        line = refused(tmp_path, "--checkpoint_dir", folder, words=words, faults=faults)
        assert "Cannot save the checkpoint" in line
        assert [path.name for path in (tmp_path / folder).iterdir()] == [".lock"]
        assert not (tmp_path / "logs" / "metrics.jsonl").exists()

    def test_without_git_the_commit_is_unknown(self, tmp_path: Path) -> None:
        done = run(
            *SHORT,
            "--max_steps",
            "0",
            "--cold_start_steps",
            "0",
            cwd=tmp_path,
            faults="import os; os.environ['PATH'] = ''",
        )
        assert done.returncode == 0 and '"commit": "unknown"' in (tmp_path / "logs" / "train.log").read_text()
