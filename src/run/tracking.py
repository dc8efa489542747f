"""What a run writes into its log folder: train.log for people, the JSON files for programs."""

import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from src.errors import printable, writing
from src.untrusted import plain_file

log = logging.getLogger("src")

LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}  # which JSON allows, and other programs split at

LOSS_NOTE = (
    "The GRPO loss hovers around 0 because advantages cancel within a group (not exactly with dapo or masked rows). "
    "It does not measure progress: watch reward, eval/accuracy, kl and grad_norm."
)
BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


class Bar(tqdm):
    """The steps of one phase, and the latest of some metrics beside them."""

    TEXTS: ClassVar = {
        "cold start": {"loss": "loss {:.3f}"},
        "GRPO": {"reward": "reward {:.2f}", "eval/accuracy": "accuracy {:.1%}", "tokens_per_second": "{:,.0f} tok/s"},
    }

    def __init__(self, phase: str, done: int, total: int):
        super().__init__(total=total, initial=done, desc=phase, disable=None, dynamic_ncols=True, bar_format=BAR)
        self.texts, self.latest = self.TEXTS[phase], {}

    def show(self, metrics: Mapping[str, float], steps: int = 0) -> None:
        """Show these, and that so many more steps are done."""
        self.latest.update(metrics)
        known = [text.format(self.latest[name]) for name, text in self.texts.items() if name in self.latest]
        self.set_postfix_str(", ".join(known), refresh=False)
        self.update(steps)


class _ConsoleHandler(logging.Handler):
    """Writes above a progress bar instead of through it; a terminal that is gone does not end the run."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


class _LogFile:
    """A file that only grows. What the disk has no room for is said once, and kept until it has.

    Raises:
        UserError: the file cannot be opened.
    """

    def __init__(self, path: Path):
        with writing(f"'{path}'", "choose another --log_dir"):
            self.file = open(path, "ab", buffering=0, opener=plain_file)  # noqa: SIM115
        self.path, self.waiting, self.told = path, b"", False

    def write(self, text: str) -> None:
        """Add text; a lone surrogate, which UTF-8 has no bytes for, becomes the escape that JSON has for it."""
        self.waiting += text.encode("utf-8", "backslashreplace")
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if not self.told:
                self.told = True
                log.warning("Cannot write to %s (%s): the run goes on and tries again.", self.path, error.strerror)

    def size(self) -> int:
        """Bytes written so far, safe on the disk, and bytes that wait for room there."""
        with suppress(OSError):
            os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size + len(self.waiting)


class RunLog:
    """The log files of one run.

    resuming: goes on with the files that are there, once `go_on` is called with their sizes at the checkpoint; what was
    written later is cut off, so that they read as if the run had never stopped. A new run starts new files; those of an
    earlier run are kept under a numbered name. tensorboard: whether to write event files too.

    Raises:
        UserError: the folder cannot be written.
    """

    FILES = ("metrics.jsonl", "samples.jsonl")

    def __init__(self, folder: Path, resuming: bool = False, tensorboard: bool = False):
        self.folder, self.tensorboard = folder, tensorboard
        self.events: dict[str, Any] = {}  # a writer for each phase, since steps count within a phase
        with writing(f"to '{folder}'", "choose another --log_dir"):
            folder.mkdir(parents=True, exist_ok=True)
            if not resuming:
                for name in (*self.FILES, "tensorboard"):
                    _set_aside(folder / name)
        self.files = {name: _LogFile(folder / name) for name in (*self.FILES, "train.log")}
        self.handlers = [logging.StreamHandler(self.files["train.log"]), _ConsoleHandler()]
        self.handlers[1].setLevel(logging.INFO)  # each step goes to the file only; the bar shows it
        for handler in self.handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            log.addHandler(handler)
        log.setLevel(logging.DEBUG)

    def go_on(self, positions: Mapping[str, int]) -> None:
        """Cut the JSON files off at these positions; only once nothing can refuse the resumed run any more."""
        with writing(f"to '{self.folder}'", "choose another --log_dir"):
            for name in self.FILES:
                _cut_off(self.folder / name, positions[name])

    def positions(self) -> dict[str, int]:
        """How long each JSON file is, in bytes, flushed to disk."""
        return {name: self.files[name].size() for name in self.FILES}

    def about(self, facts: Mapping[str, str | None]) -> None:
        """What a repetition of the run needs besides its settings, to train.log; its device to the screen too."""
        log.info("device: %s, processes: %s", facts["device"], facts["processes"])
        log.debug("run: %s", json.dumps(facts))

    def settings(self, values: Mapping[str, Any], telling: Collection[str]) -> None:
        """settings.json, for whoever compares runs, and train.log. telling: those that tell two runs apart."""
        log.debug("settings: %s", json.dumps(values))  # long, and in the file: not to the screen
        path, silent = self.folder / "settings.json", sorted(values.keys() - telling)
        with writing(f"'{path}'", "free some disk space"), open(path, "w", encoding="utf-8", opener=plain_file) as file:
            file.write(json.dumps({**values, "not_compared": silent}, indent=1))

    def metrics(self, phase: str, step: int, values: Mapping[str, float | None]) -> None:
        """One line of metrics.jsonl; what is not finite has no number in JSON and is left out."""
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self._write("metrics.jsonl", {"phase": phase, "step": step, **finite})
        if self.tensorboard:
            self._to_tensorboard(phase, step, finite)

    def _to_tensorboard(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # not above: nothing else needs the tensorboard package

        try:
            if phase not in self.events:  # a resumed run does again what came after its checkpoint: that is forgotten
                self.events[phase] = SummaryWriter(str(self.folder / "tensorboard" / phase), purge_step=step)
            for name, value in values.items():
                self.events[phase].add_scalar(name, value, step)
            self.events[phase].flush()
        except OSError as error:
            self.tensorboard = False
            log.warning("No more TensorBoard files in %s (%s): the run goes on.", self.folder, error.strerror)

    def step(self, phase: str, step: int, values: Mapping[str, float | None]) -> None:
        """A step's metrics, to train.log too."""
        self.metrics(phase, step, values)
        log.debug("%s step %d: %s", phase, step, ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def evaluation(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """An evaluation's metrics, the main ones to the screen too."""
        self.metrics(phase, step, values)
        accuracy = [100 * values[f"eval/accuracy{end}"] for end in ("", "_low", "_high")]
        text = "step %d: accuracy %.1f%% (95%% interval %.1f to %.1f, %d problems), reward %.3f"
        log.info(text, step, *accuracy, values["eval/samples"], values["eval/reward"])

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lines of samples.jsonl: completions with their rewards; the first of them to train.log too."""
        for row in rows:
            self._write("samples.jsonl", {"step": step, **row})
        parts = {"question": "question", "truth": "answer", "completion": "completion"}
        shown = "".join(f"\n  {title}: {printable(rows[0][key])}" for title, key in parts.items())
        log.debug("sample of step %d, reward %.2f %s%s", step, rows[0]["reward"], rows[0]["rewards"], shown)

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        self.files[name].write(json.dumps(row, ensure_ascii=False).translate(LINE_ENDS) + "\n")

    def close(self) -> None:
        for writer in self.events.values():
            with suppress(OSError):
                writer.close()
        for handler in self.handlers:
            log.removeHandler(handler)
        for file in self.files.values():
            file.file.close()


class NoLog:
    """In the place of a `RunLog`, in all processes but the one that logs."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given, **named: None


def _cut_off(path: Path, size: int) -> None:
    """Cut a log off where the checkpoint was saved, or after its last whole line when it ends before that."""
    if not path.exists():
        return
    with open(path, "r+b", opener=plain_file) as file:
        if path.stat().st_size < size:
            size = file.read().rfind(b"\n") + 1
            log.warning("%s has lost lines that were written before the checkpoint", path)
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
    commit = ""
    with suppress(OSError):  # there is no git here
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=where, capture_output=True, text=True)
        commit = git.stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "commit": commit or "unknown",
        "device": f"{device} ({name}, {torch.get_num_threads()} CPU threads)",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "datasets")},
    }
