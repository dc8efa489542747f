"""A run as one page that needs no server and no network: curves, settings, and completions to browse.

    python benchmarks/report.py logs

writes `logs/report.html`. The run may still be going on.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from src.errors import UserError, writing

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
        if not isinstance(settings, dict):
            raise ValueError("its settings.json holds no settings")
    except (OSError, ValueError) as error:
        raise UserError(f"'{folder}' is no log folder of a run ({error}): name one that train.py wrote.") from error
    for row in rows:
        try:
            step, phase = int(row.pop("step")), row.pop("phase")
            values = {key: float(value) for key, value in row.items()}
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
        if phase in ("grpo", "eval"):
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
        "curves": {name: [list(curve), list(map(_rounded, curve.values()))] for name, curve in run.curves.items()},
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
            numbers = all(isinstance(value, int | float | None) for value in row["rewards"].values())
            if numbers and all(isinstance(row[name], kind) for name, kind in SAMPLE.items()):
                groups[row["step"]].append({name: row[name] for name in SAMPLE})
    size = path.stat().st_size if groups else 0
    kept = [*groups.values()][:: -max(1, math.ceil(size / PAGE_BYTES))][::-1]
    return list(itertools.chain.from_iterable(kept)), sum(map(len, groups.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page of each log folder named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write report.html into log folders of runs.")
    parser.add_argument("folders", nargs="+", type=Path, help="log folders, such as logs")
    try:
        for folder in parser.parse_args(argv).folders:
            write_page(folder, folder / "report.html")
            print(folder / "report.html")
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
