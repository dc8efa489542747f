"""The curves of several runs in one picture, from their log folders.

    python benchmarks/draw.py runs/a/logs runs/b/logs --output curves.png

Runs that differ in nothing but their seed become one line, their mean, inside the band from the lowest to the highest.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.report import PANELS, PERCENT, RunCurves, read_run, write_whole
from src.errors import UserError

COLOURS = ("#2563c9", "#d9541e", "#1d9a6c", "#a3479c", "#8a6d00", "#50606e", "#0e8ba8", "#b3264a")
INK, MUTED, GRID = "#22282e", "#66707a", "#e3e6ea"


def draw_curves(runs: Sequence[RunCurves], path: Path) -> None:
    """Draw every panel and write the picture whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    groups, columns = _group(runs), 3
    figure, top = Figure(figsize=(16, 7.4)), 0.88 - 0.025 * -(-len(groups) // columns)
    figure.subplots_adjust(left=0.035, right=0.985, top=top, bottom=0.09, wspace=0.18, hspace=0.24)
    for axes, (metric, title) in zip(figure.subplots(2, 4, sharex=True).flat, PANELS.items(), strict=True):
        if metric == "reward/" and len(groups) > 1:
            metric, title = "accuracy", "Accuracy of sampled completions"
        _panel(axes, metric, title, groups)
    title = runs[0].title if len({run.title for run in runs}) == 1 else f"{len(runs)} runs"
    figure.suptitle(title, x=0.012, ha="left", fontsize=15, color=INK, weight="bold")
    figure.supxlabel("GRPO step", color=MUTED, fontsize=9)
    if len(groups) > 1:
        drawn = (axes.get_legend_handles_labels() for axes in figure.axes)  # a panel without a line has none
        below = {"loc": "upper left", "bbox_to_anchor": (0.006, 0.955), "ncols": columns, "frameon": False}  # the title
        figure.legend(*max(drawn, key=lambda lines: len(lines[1])), **below)
    else:
        many = f"{len(runs)} runs: mean, lowest to highest" if len(runs) > 1 else "band: 95% interval; bold: smoothed"
        figure.text(0.985, 0.96, many, fontsize=10, color=MUTED, ha="right")
    write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"))


def _group(runs: Sequence[RunCurves]) -> dict[str, list[RunCurves]]:
    """Runs that nothing tells apart, under the settings that tell them from the others."""
    names = {name for run in runs for name in run.settings}.difference(*(run.not_compared for run in runs))
    different = [n for n in sorted(names) if len({repr(run.settings.get(n)) for run in runs}) > 1]
    groups: dict[str, list[RunCurves]] = defaultdict(list)
    for run in runs:
        groups[", ".join(f"{n} {run.settings.get(n)}" for n in different)].append(run)
    return groups


def _panel(axes: Axes, metric: str, title: str, groups: Mapping[str, Sequence[RunCurves]]) -> None:
    """A line of this metric for each group; `reward/`: of the one group, a line for each reward."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, weight="bold")
    axes.tick_params(colors=MUTED, length=0, labelsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if metric in PERCENT:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lines = [(label, runs, metric) for label, runs in groups.items()]
    if metric == "reward/":
        (runs,) = groups.values()
        names = dict.fromkeys(name for run in runs for name in run.curves if name.startswith(metric))
        lines = [(name.removeprefix(metric).replace("_", " "), runs, name) for name in names]
    for colour, line in zip(cycle(COLOURS), lines, strict=False):
        _line(axes, colour, *line)
    if metric == "reward/" and lines:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    if not any(any(line.get_ydata()) for line in axes.lines):
        text = "0 throughout" if axes.lines else "not recorded"
        axes.text(0.5, 0.53, text, transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_yticks([])


def _line(axes: Axes, colour: str, label: str, runs: Sequence[RunCurves], metric: str) -> None:
    """The mean over runs of one metric, smoothed when it is noisy, with a band: of seeds, or of the interval."""
    values = pd.DataFrame([run.curves.get(metric, {}) for run in runs]).T.dropna()  # a column a run
    if values.empty:
        return
    validation = metric.startswith("eval/")
    smooth = values if validation else values.rolling(max(1, int(len(values) / 20 + 0.5)), min_periods=1).mean()
    if len(runs) > 1:
        axes.fill_between(values.index, smooth.min(axis=1), smooth.max(axis=1), color=colour, alpha=0.18, linewidth=0)
    elif metric == "eval/accuracy":
        ends = ([runs[0].curves[f"{metric}_{end}"][step] for step in values.index] for end in ("low", "high"))
        axes.fill_between(values.index, *ends, color=colour, alpha=0.18, linewidth=0)
    elif not validation:
        axes.plot(values, color=colour, alpha=0.2, linewidth=0.8)
    marker = "o" if validation else None
    axes.plot(smooth.mean(axis=1), color=colour, linewidth=2, label=label, marker=marker, markersize=4)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the runs named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Draw runs from their log folders.")
    parser.add_argument("runs", nargs="+", type=Path, help="log folders; seeds of one setting become a band")
    parser.add_argument("--output", type=Path, help="PNG file; curves.png in the first folder when left out")
    args = parser.parse_args(argv)
    output = args.output or args.runs[0] / "curves.png"
    try:
        draw_curves([read_run(folder) for folder in args.runs], output)
    except UserError as error:
        print(f"draw: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
