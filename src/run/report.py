"""Pictures of runs, from their log folders: `python -m src.run.report logs [another/logs ...] --output curves.png`.

Runs that differ in nothing but their seed become one line, their mean, inside the band from the lowest to the highest.
`--html report.html` makes one run a page: the same curves, the settings, and its completions to browse.
"""

import argparse
import itertools
import json
import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from src.errors import UserError
from src.rewards import answer_accuracy

log = logging.getLogger("src.run.report")

COLOURS = ("#2563c9", "#d9541e", "#1d9a6c", "#a3479c", "#8a6d00", "#50606e", "#0e8ba8", "#b3264a")
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
INK, MUTED, GRID = "#22282e", "#66707a", "#e3e6ea"
# Settings that do not tell runs apart.
PLACES = {"checkpoint_dir", "log_dir", "config", "resume", "allow_changes", "tensorboard", "system_prompt"}
MAX_POINTS = 1000  # of a curve
PAGE_CHARACTERS = 4_000_000  # of samples.jsonl that the page takes along


@dataclass(frozen=True)
class RunCurves:
    """What one log folder holds; `curves[metric]` maps a GRPO step to a value, in order.

    Of a curve longer than MAX_POINTS there are the means over stretches of it, each at its last step.
    """

    name: str
    settings: Mapping[str, object]
    curves: Mapping[str, Mapping[int, float]]

    @property
    def title(self) -> str:
        """What was trained on what."""
        return f"{self.settings.get('model', self.name)} on {self.settings.get('dataset', '?')}"


def read_run(folder: Path) -> RunCurves:
    """Read `metrics.jsonl` and `settings.json`; a line that is not whole, as a crash leaves it, is passed over.

    Raises:
        UserError: there is nothing to draw.
    """
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{folder}' is not the log folder of a run ({error}): name one that train.py wrote."
        ) from error
    for line in lines:
        try:
            row = json.loads(line)
            step, phase = int(row.pop("step")), row.pop("phase")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if phase in ("grpo", "eval", "final_eval"):
            for key, value in row.items():
                name = key if phase == "grpo" else f"{phase}/{key.removeprefix('eval/')}"
                curves[name][step] = float(value)
    if not curves:
        raise UserError(f"'{folder}' holds no GRPO step yet: draw it once the run has come that far.")
    return RunCurves(folder.name, settings, {metric: _thinned(curve) for metric, curve in curves.items()})


def _thinned(curve: Mapping[int, float]) -> dict[int, float]:
    width = math.ceil(len(curve) / MAX_POINTS)
    items = sorted(curve.items())
    parts = [items[i : i + width] for i in range(0, len(items), width)]
    return {part[-1][0]: sum(value for _, value in part) / len(part) for part in parts}


def illustrate(folder: Path) -> None:
    """curves.png and report.html of a run that may still be going on, which no failure here may end."""
    try:
        draw_curves([read_run(folder)], folder / "curves.png")
        write_page(folder, folder / "report.html")
    except Exception as error:
        log.warning("the pictures were not drawn (%s); the run goes on", " ".join(str(error).split()) or repr(error))


def results(folder: Path) -> str:
    """A table of what a run has come to: its validation before GRPO, the best one, the last, and a final evaluation."""
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
    except (UserError, KeyError) as error:
        return f"  no table of results: {error}"
    return "\n".join(lines)


def draw_curves(runs: Sequence[RunCurves], path: Path) -> None:
    """Draw every panel and write the picture whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    figure = Figure(figsize=(16, 7.4))
    figure.subplots_adjust(left=0.035, right=0.985, top=0.87, bottom=0.07, wspace=0.18, hspace=0.24)
    groups = _group(runs)
    for axes, (metric, title) in zip(figure.subplots(2, 4, sharex=True).flat, PANELS.items(), strict=True):
        lines = [(name, group, metric) for name, group in groups.items()]
        if metric == "reward/" and len(groups) > 1:
            title = "Accuracy of sampled completions"
            lines = [(name, group, "reward/answer_accuracy") for name, group in groups.items()]
        elif metric == "reward/":
            metrics = dict.fromkeys(m for run in runs for m in run.curves if m.startswith(metric))
            lines = [(m.removeprefix(metric).replace("_", " "), runs, m) for m in metrics]
        _dress(axes, title, metric in PERCENT)
        for colour, (label, group, name) in zip(itertools.cycle(COLOURS), lines, strict=False):
            _line(axes, group, name, colour, label)
        if metric == "reward/" and len(groups) == 1 and lines:
            axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        _remark(axes, [line for _, group, name in lines for run in group if (line := run.curves.get(name))])
    title = runs[0].title if len({run.title for run in runs}) == 1 else f"{len(runs)} runs"
    figure.text(0.012, 0.945, title, fontsize=15, color=INK, weight="bold")
    if len(groups) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="upper right", ncols=3, frameon=False)
    else:
        many = f"{len(runs)} runs: mean, lowest to highest" if len(runs) > 1 else "band: 95% interval; bold: smoothed"
        figure.text(0.985, 0.945, many, fontsize=10, color=MUTED, ha="right")
    _write(path, lambda file: figure.savefig(file, dpi=110, format="png"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write '{path}' ({error.strerror}): choose another place.") from error


def _dress(axes: Axes, title: str, percent: bool) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, weight="bold")
    axes.tick_params(colors=MUTED, length=0, labelsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if axes.get_subplotspec().is_last_row():
        axes.set_xlabel("GRPO step", color=MUTED, fontsize=9)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _remark(axes: Axes, curves: Sequence[Mapping[int, float]]) -> None:
    """Say why a panel shows nothing."""
    if not any(value for curve in curves for value in curve.values()):
        text = "0 throughout" if curves else "not recorded"
        axes.text(0.5, 0.53, text, transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_yticks([])


def _group(runs: Sequence[RunCurves]) -> dict[str, list[RunCurves]]:
    """Runs with equal settings, the seed aside, under the settings that tell them from the others."""
    names = {name for run in runs for name in run.settings} - PLACES - {"seed"}
    different = [n for n in sorted(names) if len({repr(run.settings.get(n)) for run in runs}) > 1]
    groups: dict[str, list[RunCurves]] = defaultdict(list)
    for run in runs:
        groups[", ".join(f"{n} {run.settings.get(n)}" for n in different)].append(run)
    return groups


def _line(axes: Axes, runs: Sequence[RunCurves], metric: str, colour: str, label: str) -> None:
    """The mean over runs of one metric, smoothed when it is noisy, with a band: of seeds, or of the interval."""
    steps = sorted(set.intersection(*(set(run.curves.get(metric, {})) for run in runs)))
    if not steps:
        return
    validation = metric.startswith("eval/")
    series = [_values(run.curves[metric], steps, smooth=not validation) for run in runs]
    mean = [sum(values) / len(values) for values in zip(*series, strict=True)]
    if len(runs) > 1:
        axes.fill_between(
            steps, list(map(min, *series)), list(map(max, *series)), color=colour, alpha=0.18, linewidth=0
        )
    elif metric == "eval/accuracy":
        ends = [[runs[0].curves[f"{metric}_{end}"][step] for step in steps] for end in ("low", "high")]
        axes.fill_between(steps, *ends, color=colour, alpha=0.18, linewidth=0)
    elif not validation:
        axes.plot(steps, [runs[0].curves[metric][step] for step in steps], color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(steps, mean, color=colour, linewidth=2, label=label, marker="o" if validation else None, markersize=4)


def _values(curve: Mapping[int, float], steps: Sequence[int], smooth: bool) -> list[float]:
    """Its values, or their running mean over a twentieth of the run."""
    values = [curve[step] for step in steps]
    width = max(1, len(values) // 20) if smooth else 1
    starts = [max(0, i - width + 1) for i in range(len(values))]
    return [sum(values[start : i + 1]) / (i + 1 - start) for i, start in enumerate(starts)]


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
            metric: [list(curve), list(map(_short, curve.values()))]
            for metric, curve in run.curves.items()
            if not metric.startswith("final_eval/")
        },
        "samples": samples,
        "total": total,
    }
    # The page's JSON must hold no "<": the only character that could end the element it stands in.
    text = json.dumps(data).replace("<", "\\u003c")
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8").replace("{{data}}", text, 1)
    _write(path, lambda file: file.write_text(page, encoding="utf-8"))


def _short(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _read_samples(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The completions, or those of evenly spread steps when all would be too many; and how many there are."""
    groups: dict[str, list[str]] = defaultdict(list)
    size = 0
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                groups[line.partition(",")[0]].append(line)  # every line begins {"step": 10,
                size += len(line)
    every = max(1, math.ceil(size / PAGE_CHARACTERS))
    rows = []
    for line in itertools.chain.from_iterable([*groups.values()][::-1][::every][::-1]):
        try:
            row = json.loads(line, parse_constant=lambda name: None)
            rows.append(row | {"right": answer_accuracy(row["completion"], row["answer"]) == 1})
        except (ValueError, KeyError, TypeError):
            continue
    return rows, sum(map(len, groups.values()))


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
