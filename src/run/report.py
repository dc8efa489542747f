"""Pictures of runs, from their log folders: `python -m src.run.report logs [another/logs ...] --output curves.png`.

Runs that differ in nothing but their seed become one line, their mean, inside the band from the lowest to the highest.
`--html report.html` makes one run a page: the same curves, the settings, and its completions to browse.
"""

import argparse
import itertools
import json
import logging
import math
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from src.errors import UserError, one_line
from src.run.curves import PANELS, PERCENT, draw_curves, read_lines, read_run, write_whole

log = logging.getLogger("src.run.report")

PAGE_BYTES = 4_000_000  # of samples.jsonl that the page takes along
SAMPLE = {"step": int, "question": str, "answer": str, "completion": str, "reward": int | float | None}
SAMPLE |= {"rewards": dict, "truncated": bool, "correct": bool}


def illustrate(folder: Path) -> None:
    """curves.png and report.html of a run that may still be going on, which no failure here may end."""
    drawn = {
        "curves.png": lambda path: draw_curves([read_run(folder)], path),
        "report.html": partial(write_page, folder),
    }
    for name, draw in drawn.items():
        try:
            draw(folder / name)
        except Exception as error:
            log.warning("%s was not drawn (%s); the run goes on", name, one_line(error))


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
            lines.append(
                "  no signal in the last fifth of the run: in each group all earned the same; try other problems"
            )
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


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the runs named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m src.run.report", description="Draw runs from their log folders.")
    parser.add_argument("runs", nargs="+", type=Path, help="log folders; seeds of one setting become a band")
    parser.add_argument("--output", type=Path, help="PNG file; curves.png in the first folder when left out")
    parser.add_argument("--html", type=Path, help="write one run as a page instead, with its completions to browse")
    args = parser.parse_args(argv)
    output = args.html or args.output or args.runs[0] / "curves.png"
    try:
        if args.html and (args.output or len(args.runs) > 1):
            raise UserError("--html makes a page of one run: name one folder, and leave --output out.")
        if args.html:
            write_page(args.runs[0], args.html)
        else:
            draw_curves([read_run(folder) for folder in args.runs], output)
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
