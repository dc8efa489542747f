"""Files of somebody else: no code of theirs is run, none of them hangs a reader, each odd one is one clear line."""

import json
from pathlib import Path

import pytest
import torch

from src.engine.models import load_model, save_model
from src.errors import UserError
from src.hub import local_path
from src.rows import read_rows
from tests.helpers import tiny_model, word_tokenizer
from tests.processes import run

CPU = torch.device("cpu")
CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path("theirs.txt").write_text("was here")
class Theirs(LlamaConfig):
    model_type = "theirs"
class TheirModel(LlamaForCausalLM):
    config_class = Theirs
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    tokenizer = word_tokenizer()
    folder = tmp_path_factory.mktemp("saved")
    save_model(tiny_model(vocab_size=len(tokenizer)), tokenizer, folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change(file: Path, **entries: object) -> None:
    """Set entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | entries), encoding="utf-8")


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
        loaded, _ = load_model(str(model), CPU)
        assert loaded.config._attn_implementation == "sdpa"


class TestHub:
    @pytest.mark.parametrize("name", ["./mine", "../mine", "/mine", "~/mine", "a/b/c", "mine/", "here/mine", "here"])
    def test_what_looks_like_a_path_is_not_asked_of_the_hub(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here").mkdir()
        monkeypatch.setattr("src.engine.models.hub_problem", lambda: pytest.fail("asked"))
        monkeypatch.setattr("src.rows.hub_problem", lambda: pytest.fail("asked"))
        with pytest.raises(UserError, match="Cannot load the folder"):
            load_model(name, CPU)
        with pytest.raises(UserError):
            read_rows(name, "train", 0, ["question"])
        assert local_path("openai/gsm8k") is None and local_path("gpt2") is None
