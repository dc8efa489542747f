"""The model card: the front matter that the Hub reads, what was measured, no traces of the machine."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.data import SYSTEM_PROMPT
from src.grpo import GRPOConfig
from src.model_card import write_card
from src.run.state import Progress
from src.settings import TrainConfig

PROGRESS = Progress(phase="grpo", step=200, before=0.5, after=0.6, best=0.65, best_step=150)


def card(progress: Progress = PROGRESS, **settings: Any) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    with tempfile.TemporaryDirectory() as folder:
        own = {name: settings.pop(name) for name in ("rewards",) if name in settings}
        given = asdict(TrainConfig(**settings)) | asdict(GRPOConfig(**own))
        write_card(Path(folder), given, progress, 200, {"torch": "2.13.0"})
        text = (Path(folder) / "README.md").read_text(encoding="utf-8")
    empty, front, body = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), body


def test_the_front_matter_names_base_and_data():
    front, body = card()
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grpo", "math-reasoning"],
        "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
        "datasets": ["openai/gsm8k"],
    }
    assert "# Qwen/Qwen2.5-0.5B-Instruct, fine-tuned with GRPO" in body
    assert repr(SYSTEM_PROMPT) in body
    assert '"learning_rate": 3e-06' in body and "torch 2.13.0" in body and "this is `step_000200` of the run" in body


def test_accuracies_before_and_last_are_stated_with_their_problems():
    _, body = card()
    assert "on 200 test problems: before GRPO 50.0%,\nat the last validation 60.0%." in body


def test_weights_are_shown_where_they_were_used():
    assert '"reward_weights"' in card()[1]
    _, body = card(rewards="my/rewards.py:brevity=1")
    assert '"reward_weights"' not in body and '"rewards": "rewards.py:brevity=1"' in body


def test_what_has_not_been_measured_is_not_stated():
    _, body = card(Progress(phase="cold_start", step=3))
    assert body.count("not measured") == 2 and "%" not in body and "`cold_start_000003`" in body


@pytest.mark.parametrize("name", ["tiny", "my-model"])
def test_local_models_and_data_leave_no_path_behind(name: str, tmp_path: Path):
    (tmp_path / name).mkdir()
    (tmp_path / "prompt.txt").write_text("Solve it.", encoding="utf-8")
    prompt = str(tmp_path / "prompt.txt")
    front, body = card(model=str(tmp_path / name), dataset=str(tmp_path / name), lora_rank=8, system_prompt_file=prompt)
    assert not {"base_model", "datasets"} & front.keys()
    assert f"# {name}, fine-tuned" in body and str(tmp_path) not in body
    assert '"lora_rank": 8' in body and '"system_prompt_file": "prompt.txt"' in body and "'Solve it.'" in body


def test_the_code_in_it_is_python():
    _, body = card()
    compile(body.split("```python\n")[1].split("```")[0], "card", "exec")
