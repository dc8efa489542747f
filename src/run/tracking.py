"""What a run writes into its log folder: train.log for people, the JSON files for programs."""

import itertools
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from src.errors import writing
from src.run.state import Progress, State

log = logging.getLogger("src")

LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}  # which JSON allows, and other programs split at

LOSS_NOTE = "The GRPO loss mostly stays near 0 and shows no progress: watch reward, eval/accuracy, kl and grad_norm."
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
    """A file that only grows, `lines` long. What the disk has no room for is said once, and kept until it has.

    Raises:
        UserError: the file cannot be opened.
    """

    def __init__(self, path: Path, lines: int = 0):
        with writing(f"'{path}'", "choose another --log_dir"):
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115
        self.path, self.lines, self.waiting, self.told = path, lines, b"", False

    def write(self, text: str) -> None:
        """Add text; a lone surrogate, which UTF-8 has no bytes for, becomes the escape that JSON has for it."""
        self.waiting += text.encode("utf-8", "backslashreplace")
        self.lines += text.count("\n")
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if not self.told:
                self.told = True
                log.warning("Cannot write to %s (%s): the run goes on and tries again.", self.path, error.strerror)

    def sync(self) -> None:
        """See to it that what is written so far is safe on the disk, where there is room."""
        with suppress(OSError):
            os.fsync(self.file.fileno())


class RunLog:
    """The log files of one run: train.log at once, the others from `begin`.

    tensorboard: whether to write event files too.

    Raises:
        UserError: a file in the folder, which is there, cannot be written.
    """

    FILES = ("metrics.jsonl", "samples.jsonl")

    def __init__(self, folder: Path, tensorboard: bool = False):
        self.folder, self.tensorboard = folder, tensorboard
        self.events: Any = None  # TensorBoard's writer
        self.files: dict[str, _LogFile] = {}
        self.text = _LogFile(folder / "train.log")
        self.handlers = [logging.StreamHandler(self.text), _ConsoleHandler()]
        self.handlers[1].setLevel(logging.INFO)  # each step goes to the file only; the bar shows it
        for handler in self.handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            log.addHandler(handler)
        log.setLevel(logging.DEBUG)

    def begin(self, run: str, settings: Mapping[str, Any], tells: Collection[str], saved: State | None = None) -> None:
        """Open the JSON files; only once nothing can refuse the run any more.

        A run that goes on from `saved` goes on with its files: what was written later is put beside them, so that they
        read as if it had never stopped. Those of another run are kept under a numbered name. tells: the settings
        that tell two runs apart.
        """
        log.debug("settings: %s", json.dumps(settings))  # long, and in the file: not to the screen
        with writing(f"to '{self.folder}'", "free some disk space, or choose another --log_dir"):
            if saved is None or self._owner() not in (None, run):
                _set_aside(self.folder, (*self.FILES, "settings.json", "tensorboard"))
            for name in self.FILES:
                lines = _cut_off(self.folder / name, saved) if saved else 0
                self.files[name] = _LogFile(self.folder / name, lines)
            silent = sorted({*settings, "run"} - set(tells))
            text = json.dumps({**settings, "run": run, "not_compared": silent}, indent=1)
            (self.folder / "settings.json").write_text(text, encoding="utf-8")
            if self.tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # nothing else needs the tensorboard package

                self.events = SummaryWriter(str(self.folder / "tensorboard"))

    def _owner(self) -> str | None:
        """The run whose files these are, as far as they say."""
        with suppress(OSError, ValueError, AttributeError):
            return json.loads((self.folder / "settings.json").read_text(encoding="utf-8")).get("run")
        return None

    def lines(self) -> dict[str, int]:
        """How many lines each JSON file has; all that is logged is flushed to disk."""
        for file in (self.text, *self.files.values()):
            file.sync()
        return {name: file.lines for name, file in self.files.items()}

    def about(self, facts: Mapping[str, str | None]) -> None:
        """What a repetition of the run needs besides its settings, to train.log; its device to the screen too."""
        log.info("device: %s, processes: %s", facts["device"], facts["processes"])
        log.debug("run: %s", json.dumps(facts))

    def metrics(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl; what is not finite has no number in JSON and is left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._write("metrics.jsonl", {"phase": phase, "step": step, **finite})
        try:
            if self.events:
                for name, value in finite.items():
                    self.events.add_scalar(f"{phase}/{name.removeprefix('eval/')}", value, step)
                self.events.flush()
        except OSError as error:
            self.events = None
            log.warning("No more TensorBoard files in %s (%s): the run goes on.", self.folder, error.strerror)

    def step(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """A step's metrics, to train.log too."""
        self.metrics(phase, step, values)
        log.debug("%s step %d: %s", phase, step, ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """An evaluation's metrics, the main ones to the screen too."""
        self.metrics("eval", step, values)
        accuracy = [100 * values[f"eval/accuracy{end}"] for end in ("", "_low", "_high")]
        text = "step %d: accuracy %.1f%% (95%% interval %.1f to %.1f, %d problems), reward %.3f"
        log.info(text, step, *accuracy, values["eval/samples"], values["eval/reward"])

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lines of samples.jsonl: completions with their rewards; the first of them to train.log too."""
        for row in rows:
            self._write("samples.jsonl", {"step": step, **row})
        text = "sample of step %d, reward %.2f %s\n  question: %s\n  truth: %s\n  completion: %s"
        log.debug(text, step, *(rows[0][key] for key in ("reward", "rewards", "question", "answer", "completion")))

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        self.files[name].write(json.dumps(row, ensure_ascii=False).translate(LINE_ENDS) + "\n")

    def summary(self, p: Progress, checkpoint: Path) -> None:
        """What the run has come to, where that is, and what to do next."""
        end = f"accuracy: {p.before:.1%} before, {p.best:.1%} at best (step {p.best_step}), {p.after:.1%} at the end\n"
        end += f"checkpoint: {checkpoint}\nnext: python test.py --checkpoint {shlex.quote(str(checkpoint))}"
        with suppress(OSError, ValueError, TypeError):  # an edited line, or one that the disk has no room for
            rows = map(json.loads, (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
            shares = [row["zero_signal_groups"] for row in rows if "zero_signal_groups" in row]
            last = shares[-max(3, len(shares) // 5) :]  # three steps at least, if there are so many
            if last and min(last) == 1:
                end += "\nno signal in the last fifth of the run: in each group all earned the same; try other problems"
        log.info("done\n%s", end)

    def close(self) -> None:
        if self.events:
            with suppress(OSError):
                self.events.close()
        for handler in self.handlers:
            log.removeHandler(handler)
        for file in (self.text, *self.files.values()):
            file.file.close()


class NoLog:
    """In the place of a `RunLog`, in all processes but the one that logs."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given, **named: None


Log = RunLog | NoLog


def _cut_off(path: Path, saved: State) -> int:
    """Put the lines that came after the checkpoint beside a log, as well as a last one that is not whole.

    Returns how many are left: those counted then, wherever a hand has changed them since, or all where some are lost.
    """
    if not path.exists():
        return 0
    wanted = saved.log_lines.get(path.name, 0)
    with open(path, "rb+") as file:
        kept = [len(line) for line in itertools.islice(file, wanted) if line.endswith(b"\n")]
        if len(kept) < wanted:
            log.warning("%s has lost lines that were written before the checkpoint", path)
        file.seek(sum(kept))
        if tail := file.read():
            with open(path.with_suffix(f".cut{path.suffix}"), "ab") as beside:
                beside.write(tail)
        file.truncate(sum(kept))
    return len(kept)


def _set_aside(folder: Path, names: Sequence[str]) -> None:
    """Keep what is there of these under a number that nothing has yet."""
    number = next(i for i in itertools.count(1) if not any(folder.glob(f"*.{i}*")))
    for path in (folder / name for name in names):
        if path.exists() and path.stat().st_size:
            kept = path.with_name(f"{path.stem}.{number}{path.suffix}")
            path.rename(kept)
            log.info("%s is of another run, and kept as %s", path, kept.name)
