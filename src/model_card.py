"""README.md of a checkpoint, its text being src/model_card.md: what was trained, on what, and what was measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.hub import local_path
from src.run.state import Progress


def write_card(
    folder: Path, settings: Mapping[str, Any], progress: Progress, samples: int, versions: Mapping[str, str]
) -> None:
    """A card with the front matter that the Hugging Face Hub reads. samples: problems in a validation.

    What is a path in the settings is named by its last part; local models and data are left out of the front matter.
    """
    model, dataset, accuracies = settings["model"], settings["dataset"], (progress.before, progress.after)
    before, after = ("not measured" if a is None else f"{100 * a:.1f}%" for a in accuracies)
    origin = f"base_model: {model}\n" * _on_hub(model) + f"datasets:\n- {dataset}\n" * _on_hub(dataset)
    names = ("model", "dataset", "rewards", "system_prompt_file")
    local = {name: settings[name] for name in names if settings[name] and not _on_hub(settings[name])}
    shown = settings | {name: Path(path).resolve().name for name, path in local.items()}
    # --rewards has its weights in it, and --reward_weights is of no account then.
    shown = {name: shown[name] for name in shown if name != "reward_weights" or not shown["rewards"]}
    parts = {name: shown.pop(name) for name in ("model", "dataset", "system_prompt")}
    parts |= {"origin": origin, "place": progress.name, "before": before, "after": after}
    parts |= {"samples": samples, "tokens": settings["max_completion_tokens"], "settings": json.dumps(shown, indent=1)}
    parts["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8").format(**parts)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _on_hub(name: str) -> bool:  # a Hub id has no character that YAML would take for its own
    return "/" in name and local_path(name) is None
