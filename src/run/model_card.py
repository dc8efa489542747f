"""README.md of a checkpoint, its text being src/run/model_card.md: what was trained, on what, and what was measured."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from src.data import SYSTEM_PROMPT
from src.intervals import wilson_interval
from src.rows import HUB_ID
from src.run.saving import Progress

# Of the machine, not of the model; or said elsewhere in the card.
LEFT_OUT = {"config", "checkpoint_dir", "log_dir", "resume", "device", "allow_changes", "tensorboard"}
LEFT_OUT |= {"model", "dataset", "system_prompt", "system_prompt_file"}


def model_card(
    settings: Mapping[str, Any],
    progress: Progress,
    samples: int,
    versions: Mapping[str, str],
    system_prompt: str = SYSTEM_PROMPT,
) -> str:
    """A card with the front matter that the Hugging Face Hub reads. samples: problems in a validation.

    Local models and data are named by their last folder, and left out of the front matter.
    """
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"tags": ["grpo", "math-reasoning"], "license": "other", "license_name": "see-base-model"}
    if _on_hub(settings["model"]):
        link = f"https://huggingface.co/{settings['model']}"
        front |= {"base_model": settings["model"], "license_link": link}
    if _on_hub(settings["dataset"]):
        front["datasets"] = [settings["dataset"]]
    rank = settings.get("lora_rank")
    shown = {name: value for name, value in settings.items() if name not in LEFT_OUT}
    if rewards := settings.get("rewards"):
        shown["rewards"] = rewards.rpartition("/")[2]
        shown.pop("reward_weights", None)
    template = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    body = template.format(
        base=_name(settings["model"]),
        dataset=_name(settings["dataset"]),
        how=f"LoRA adapters of rank {rank}, merged into the weights." if rank else "All weights were trained.",
        samples=samples,
        accuracy="\n".join(_accuracy_rows(progress, samples)),
        system=system_prompt,
        tokens=settings["max_completion_tokens"],
        phase="GRPO" if progress.phase == "grpo" else "Cold start",
        step=progress.step,
        settings=json.dumps(shown, indent=1),
        versions=", ".join(f"{name} {value}" for name, value in versions.items()),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{body}"


def _accuracy_rows(p: Progress, samples: int) -> list[str]:
    measured = {"before GRPO": p.before, "last validation": p.after}
    if p.best >= 0:
        measured[f"best (step {p.best_step}, chosen on these problems)"] = p.best
    rows = []
    for what, accuracy in measured.items():
        if accuracy is not None:
            low, high = wilson_interval(round(accuracy * samples), samples)
            rows.append(f"| {what} | {100 * accuracy:.1f}% ({100 * low:.1f} to {100 * high:.1f}) |")
    return rows or ["| not measured yet | |"]


def _on_hub(name: str) -> bool:
    return "/" in name and re.fullmatch(HUB_ID, name) is not None and not Path(name).expanduser().exists()


def _name(name: str) -> str:
    return name if _on_hub(name) else Path(name).expanduser().resolve().name
