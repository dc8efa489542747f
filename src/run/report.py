"""What a run has come to: a table at its end, and a page with its curves and completions."""

import itertools
import json
import logging
import math
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from src.errors import UserError, one_line, writing

log = logging.getLogger(__name__)

PANELS = {
    "eval/accuracy": "Held-out greedy accuracy",
    "reward": "Reward of sampled completions",
    "reward/": "Each reward, unweighted",
    "completion_tokens": "Tokens a completion",
    "kl": "KL from the reference",
    "entropy": "Entropy, nats a token",
    "grad_norm": "Gradient norm",
    "zero_signal_groups": "Share of groups without signal",
}
PERCENT = {"eval/accuracy", "zero_signal_groups"}
NO_SIGNAL = "  no signal in the last fifth of the run: in each group all earned the same; try other problems"
PAGE_BYTES = 4_000_000  # of samples.jsonl that the page takes along
SAMPLE = {"step": int, "question": str, "answer": str, "completion": str, "reward": int | float | None}
SAMPLE |= {"rewards": dict, "truncated": bool, "correct": bool}


class RunCurves(NamedTuple):
    """What one log folder holds; `curves[metric]` maps a GRPO step to a value, in order."""

    title: str  # what was trained on what
    settings: Mapping[str, object]
    not_compared: Collection[str]  # the settings that do not tell two runs apart
    curves: Mapping[str, Mapping[int, float]]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines; a line that is not whole, as a crash leaves it, is passed over."""
    for line in path.read_bytes().splitlines():
        with suppress(ValueError, RecursionError):  # invalid bytes are a ValueError too
            row = json.loads(line, parse_constant=lambda name: None)  # the page's JSON has no NaN
            if isinstance(row, dict):
                yield row


def read_run(folder: Path) -> RunCurves:
    """Read `metrics.jsonl` and `settings.json`; an odd line is passed over.

    Raises:
        UserError: there is nothing to draw.
    """
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    try:
        rows = list(read_lines(folder / "metrics.jsonl"))
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{folder}' is no log folder of a run ({error}): name one that train.py wrote.") from error
    for row in rows:
        try:
            step, phase = int(row.pop("step")), row.pop("phase")
            values = {key: float(value) for key, value in row.items()}
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
        if phase in ("grpo", "eval", "final_eval"):
            for key, value in values.items():
                name = key if phase == "grpo" else f"{phase}/{key.removeprefix('eval/')}"
                curves[name][step] = value
    if not curves:
        raise UserError(f"'{folder}' holds no GRPO step yet: look again once the run has come that far.")
    title = f"{settings.get('model', folder.name)} on {settings.get('dataset', '?')}"
    not_compared = settings.pop("not_compared", ())
    in_order = {name: dict(sorted(curve.items())) for name, curve in curves.items()}
    return RunCurves(title, settings, not_compared, in_order)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    with writing(f"'{path}'", "choose another place"):
        try:
            temporary.unlink(missing_ok=True)  # not through a link that is there
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def illustrate(folder: Path) -> None:
    """report.html of a run that may still be going on, which no failure here may end."""
    try:
        write_page(folder, folder / "report.html")
    except Exception as error:
        log.warning("report.html was not written (%s); the run goes on", one_line(error))


def summary(folder: Path, checkpoint: Path) -> str:
    """What a run with this log folder has come to, where that is, and what to do next."""
    rows = {"checkpoint": checkpoint, "report": f"{folder / 'report.html'} (curves, completions)"}
    rows["next"] = f"python test.py --checkpoint {shlex.quote(str(checkpoint))}"
    return "\n".join([_results(folder), *(f"  {name:12}{what}" for name, what in rows.items())])


def _results(folder: Path) -> str:
    """A table: the validation before GRPO, the best one, the last, and a final evaluation."""
    try:
        curves = read_run(folder).curves
        accuracy = curves["eval/accuracy"]
        steps = {"before": min(accuracy), "best": max(accuracy, key=accuracy.get), "after": max(accuracy)}
        rows = [(name, "eval", step) for name, step in steps.items()]
        rows += [("final", "final_eval", step) for step in curves.get("final_eval/accuracy", {})]
        lines = [f"  {'':8}{'step':>8}   {'accuracy (95% interval)':24}{'reward':>8}{'problems':>10}"]
        for name, phase, step in rows:
            value, low, high = (100 * curves[f"{phase}/accuracy{end}"][step] for end in ("", "_low", "_high"))
            reward, samples = curves[f"{phase}/reward"][step], curves[f"{phase}/samples"][step]
            interval = f"{value:5.1f}% ({low:.1f} to {high:.1f})"
            lines.append(f"  {name:8}{step:>8}   {interval:24}{reward:>8.3f}{samples:>10.0f}")
        shares = list(curves.get("zero_signal_groups", {}).values())
        if shares and min(shares[-max(3, len(shares) // 5) :]) == 1:  # of three steps at least, where there are so many
            lines.append(NO_SIGNAL)
    except (UserError, KeyError) as error:
        return f"  no table of results: {error}"
    return "\n".join(lines)


def write_page(folder: Path, path: Path) -> None:
    """Write one run as a page that needs nothing else: curves, settings, and completions to browse.

    Raises:
        UserError: there is nothing to show, or the page cannot be written.
    """
    run = read_run(folder)
    samples, total = _read_samples(folder / "samples.jsonl")
    data = {
        "title": run.title,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "settings": run.settings,
        "panels": [[metric, title, metric in PERCENT] for metric, title in PANELS.items()],
        "curves": {
            metric: [list(curve), list(map(_rounded, curve.values()))]
            for metric, curve in run.curves.items()
            if not metric.startswith("final_eval/")
        },
        "samples": samples,
        "total": total,
    }
    # The page's JSON must hold no "<": the only character that could end the element it stands in.
    text = json.dumps(data).replace("<", "\\u003c")
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8").replace("{{data}}", text, 1)
    write_whole(path, lambda file: file.write_text(page, encoding="utf-8"))


def _rounded(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _read_samples(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The completions, or those of evenly spread steps when all would be too many; and how many there are."""
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in read_lines(path) if path.exists() else ():
        with suppress(KeyError, TypeError, AttributeError):
            row.setdefault("correct", row["rewards"].get("answer_accuracy") == 1)  # earlier versions did not say it
            numbers = all(isinstance(value, int | float | None) for value in row["rewards"].values())
            if numbers and all(isinstance(row[name], kind) for name, kind in SAMPLE.items()):
                groups[row["step"]].append({name: row[name] for name in SAMPLE})
    size = path.stat().st_size if groups else 0
    kept = [*groups.values()][:: -max(1, math.ceil(size / PAGE_BYTES))][::-1]
    return list(itertools.chain.from_iterable(kept)), sum(map(len, groups.values()))
