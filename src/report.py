"""Pictures of runs, from their log folders: `python -m src.report logs [another/logs ...] --output curves.png`.

Runs that differ in nothing but their seed become one line, their mean, inside the band from the lowest to the highest.
"""

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.errors import UserError

COLOURS = ("#2563c9", "#d9541e", "#1d9a6c", "#a3479c", "#8a6d00", "#50606e")
PANELS = {
    "eval/accuracy": "Held-out greedy accuracy",
    "reward": "Reward of the sampled completions",
    "reward/": "Each reward, unweighted",
    "completion_tokens": "Tokens a completion",
    "kl": "KL from the reference",
    "entropy": "Entropy, nats a token",
    "grad_norm": "Gradient norm",
    "zero_signal_groups": "Share of groups without signal",
}
INK, GRID = "#22282e", "#e3e6ea"
PLACES = {"checkpoint_dir", "log_dir", "config", "resume"}  # settings that do not tell runs apart


@dataclass(frozen=True)
class RunCurves:
    """What one log folder holds; `curves[metric]` maps a GRPO step to a value."""

    name: str
    settings: Mapping[str, object]
    curves: Mapping[str, Mapping[int, float]]


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
        if phase in ("grpo", "eval"):
            for key, value in row.items():
                curves[key][step] = float(value)
    if not curves:
        raise UserError(f"'{folder}' holds no GRPO step yet: draw it once the run has come that far.")
    return RunCurves(folder.name, settings, curves)


def draw_curves(runs: Sequence[RunCurves], path: Path) -> None:
    """Draw every panel and write the picture whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    figure = Figure(figsize=(16, 7.2), layout="constrained")
    groups = _group(runs)
    for axes, (metric, title) in zip(figure.subplots(2, 4).flat, PANELS.items(), strict=True):
        lines = [(name, group, metric) for name, group in groups.items()]
        if metric == "reward/" and len(groups) > 1:
            title = "Accuracy of the sampled completions"
            lines = [(name, group, "reward/answer_accuracy") for name, group in groups.items()]
        elif metric == "reward/":
            metrics = dict.fromkeys(m for run in runs for m in run.curves if m.startswith(metric))
            lines = [(m.removeprefix(metric).replace("_", " "), runs, m) for m in metrics]
        _dress(axes, title)
        for colour, (label, group, name) in zip(itertools.cycle(COLOURS), lines, strict=False):
            _line(axes, group, name, colour, label)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(temporary, dpi=110, format="png")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write '{path}' ({error.strerror}): choose another place.") from error


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("GRPO step", color=INK, fontsize=9)
    axes.tick_params(colors=INK, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[:].set_visible(False)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the runs named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m src.report", description="Draw runs from their log folders.")
    parser.add_argument("runs", nargs="+", type=Path, help="log folders; seeds of one setting become a band")
    parser.add_argument("--output", type=Path, help="PNG file; curves.png in the first folder when left out")
    args = parser.parse_args(argv)
    output = args.output or args.runs[0] / "curves.png"
    try:
        draw_curves([read_run(folder) for folder in args.runs], output)
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
