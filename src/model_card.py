"""README.md of a checkpoint, its text being src/model_card.md: what was trained, on what, and what was measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.hub import local_path
from src.intervals import wilson_interval
from src.run.saving import Progress


def write_card(
    folder: Path, settings: Mapping[str, Any], progress: Progress, samples: int, versions: Mapping[str, str]
) -> None:
    """A card with the front matter that the Hugging Face Hub reads. samples: problems in a validation.

    What is a path in the settings is named by its last part; local models and data are left out of the front matter.
    """
    model, dataset = settings["model"], settings["dataset"]
    names = ("model", "dataset", "rewards", "system_prompt_file")
    shown = {**settings, **{name: _without_folder(settings[name]) for name in names}}
    if shown["rewards"]:  # which have their weights in them
        del shown["reward_weights"]
    parts = {name: shown.pop(name) for name in ("model", "dataset", "system_prompt")}
    parts |= {"samples": samples, "accuracy": _accuracy_rows(progress, samples), "step": progress.step}
    parts |= {"tokens": settings["max_completion_tokens"], "settings": json.dumps(shown, indent=1)}
    parts["phase"] = {"grpo": "GRPO", "cold_start": "Cold start"}[progress.phase]
    parts["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
    parts["origin"] = ""  # a Hub id has no character that YAML would take for its own
    if _on_hub(model):
        parts["origin"] += f"base_model: {model}\nlicense_link: https://huggingface.co/{model}\n"
    if _on_hub(dataset):
        parts["origin"] += f"datasets:\n- {dataset}\n"
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8").format(**parts)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _accuracy_rows(p: Progress, samples: int) -> str:
    best = f"best (step {p.best_step}, chosen on these problems)"
    measured = {"before GRPO": p.before, "last validation": p.after, best: p.best if p.best >= 0 else None}
    rows = []
    for what, accuracy in measured.items():
        if accuracy is not None:
            low, high = wilson_interval(round(accuracy * samples), samples)
            rows.append(f"| {what} | {100 * accuracy:.1f}% ({100 * low:.1f} to {100 * high:.1f}) |")
    return "\n".join(rows) or "| not measured yet | |"


def _on_hub(name: str) -> bool:
    return "/" in name and local_path(name) is None


def _without_folder(name: str | None) -> str | None:
    return name if name is None or _on_hub(name) else Path(name).resolve().name
