"""What a run writes into its log folder: train.log for people, the JSON files for programs."""

import json
import logging
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tqdm import tqdm

log = logging.getLogger("src")

LOSS_NOTE = (
    "The GRPO loss hovers around 0 because advantages cancel within a group (not exactly with dapo or masked rows). "
    "It does not measure progress: watch reward, eval/accuracy, kl and grad_norm."
)


class _ConsoleHandler(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class RunLog:
    """The three log files of one run.

    positions: the sizes of the two JSON files at a checkpoint; going on from there, what was written later is cut
    off, so that a resumed run's files read as if it had never stopped. None starts new files; files of an earlier
    run are kept under a numbered name.
    """

    FILES = ("metrics.jsonl", "samples.jsonl")

    def __init__(self, folder: Path, positions: Mapping[str, int] | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for name in self.FILES:
            _cut_off(folder / name, positions[name]) if positions else _set_aside(folder / name)
        self.files = {name: open(folder / name, "a", encoding="utf-8") for name in self.FILES}  # noqa: SIM115
        self.handlers = [logging.FileHandler(folder / "train.log", encoding="utf-8"), _ConsoleHandler()]
        self.handlers[1].setLevel(logging.INFO)  # each step goes to the file only; the bar shows it
        for handler in self.handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            log.addHandler(handler)
        log.setLevel(logging.DEBUG)

    def positions(self) -> dict[str, int]:
        """How much has been written to each JSON file, in bytes, flushed to disk."""
        for file in self.files.values():
            file.flush()
        return {name: (self.folder / name).stat().st_size for name in self.FILES}

    def settings(self, values: Mapping[str, Any]) -> None:
        """settings.json, for whoever compares runs."""
        (self.folder / "settings.json").write_text(json.dumps(values, indent=1), encoding="utf-8")

    def metrics(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl."""
        self._write("metrics.jsonl", {"phase": phase, "step": step, **values})

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lines of samples.jsonl: completions with their rewards."""
        for row in rows:
            self._write("samples.jsonl", row)

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        self.files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
        self.files[name].flush()

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        for handler in self.handlers:
            log.removeHandler(handler)
            handler.close()


def _cut_off(path: Path, size: int) -> None:
    if path.exists() and path.stat().st_size > size:
        with open(path, "r+b") as file:
            file.truncate(size)


def _set_aside(path: Path) -> None:
    if path.exists() and path.stat().st_size:
        number = 1
        while (earlier := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        path.rename(earlier)


def describe_run(device: torch.device) -> dict[str, str]:
    """Versions, commit and device: what a repetition of the run needs besides its settings."""
    where = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=where, capture_output=True, text=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "commit": git.stdout.strip() or "unknown",
        "device": f"{device} ({name}, {torch.get_num_threads()} CPU threads)",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
    }


def printable(text: str) -> str:
    """The text without what a terminal would obey: control characters are shown as their escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
