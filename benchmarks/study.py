"""Runs of train.py that differ in what is studied alone, one after the other, and the table that compares them.

    python benchmarks/study.py FOLDER --arms divided right --seeds 0 1 2 -- --preset tiny
    python benchmarks/study.py FOLDER --report

What follows `--` goes to every run. Arms of a seed begin from the same cold start, if there is one, and see the same
problems and random numbers; so they are compared seed by seed. A run that was stopped goes on, one that is done stays.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).parents[1]
UNDIVIDED = ["--scale_advantages", "false"]
ACCURACY = ["--reward_weights", "0.3", "0", "0", "2"]
PLACEBO = f"{ROOT / 'benchmarks' / 'placebo.py'}:formatting=0.3,random_accuracy=2"
ARMS = {
    "divided": ["--scale_advantages", "true", "--shaped_rewards", "always"],
    "undivided": [*UNDIVIDED, "--shaped_rewards", "always"],
    "solved": [*UNDIVIDED, "--shaped_rewards", "solved"],
    "right": [*UNDIVIDED, "--shaped_rewards", "right"],
    "right-divided": ["--scale_advantages", "true", "--shaped_rewards", "right"],
    "accuracy-divided": ["--scale_advantages", "true", *ACCURACY],
    "accuracy": [*UNDIVIDED, *ACCURACY],
    "placebo": [*UNDIVIDED, "--rewards", PLACEBO],
    **{f"lr-{rate}": [*UNDIVIDED, "--learning_rate", rate] for rate in ("1e-6", "3e-6", "1e-5", "5e-5", "5e-4")},
    **{f"kl-{coef}": [*UNDIVIDED, "--kl_coef", coef] for coef in ("0", "0.001", "0.04")},
    **{loss: [*UNDIVIDED, "--loss_type", loss] for loss in ("grpo", "dapo")},
}
SHOWN = {
    "eval/accuracy": ("strict, %", 100),
    "eval/accuracy_lenient": ("lenient, %", 100),
    "eval/format_rate": ("exact form, %", 100),
    "eval/completion_tokens": ("tokens", 1),
}
LAST = ("reward", "wrong_advantage", "no_calculation")  # of the steps: their mean over the last fifth
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 95%, n - 1 degrees


def read(folder: Path) -> tuple[list[dict], list[dict]]:
    """The validations and the GRPO steps of a run."""
    path = folder / "logs" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["phase"] == "eval"], [row for row in rows if row["phase"] == "grpo"]


def begun(folder: Path) -> bool:
    """Whether a run has a whole checkpoint to go on from."""
    return any((folder / "checkpoints").glob("[!.]*/manifest.json"))


def train(folder: Path, flags: list[str]) -> None:
    """A run to its end, from its last checkpoint if it has one."""
    if (folder / "checkpoints" / "final").is_dir():
        return
    places = ["--checkpoint_dir", str(folder / "checkpoints"), "--log_dir", str(folder / "logs")]
    command = [sys.executable, str(ROOT / "train.py"), *flags, *places, *(["--resume"] if begun(folder) else [])]
    print(f"{folder.name}: {' '.join(flags)}", flush=True)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"study: the run in '{folder}' ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}")


def run(folder: Path, arms: list[str], seeds: list[int], common: list[str]) -> None:
    """Every arm with every seed."""
    for seed in seeds:
        flags = [*common, "--seed", str(seed)]
        start = folder / f"start-{seed}"
        train(start, [*flags, "--max_steps", "0"])
        cold = start / "checkpoints" / "cold_start"
        for arm in arms:
            place = folder / f"{arm}-{seed}"
            again = ["--allow_changes", "true", *([] if begun(place) else ["--resume", str(cold)])]
            train(place, [*flags, *ARMS[arm], *(again if cold.is_dir() else [])])


def interval(values: list[float]) -> str:
    """The mean and its 95% t interval, a little too wide above ten values."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = T.get(len(values), T[10]) * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):+.1f} ({fmean(values) - half:+.1f} to {fmean(values) + half:+.1f})"


def report(folder: Path) -> None:
    """A table: what each arm gained, and how much more than the first arm of the same seeds."""
    runs: dict[str, dict[int, tuple[list[dict], list[dict]]]] = {}
    for arm in ARMS:
        for place in folder.glob(f"{arm}-*"):
            seed = place.name.removeprefix(f"{arm}-")
            evals, steps = read(place)
            if seed.isdecimal() and steps and evals:
                runs.setdefault(arm, {})[int(seed)] = (evals, steps)
    print("| arm | seeds | steps | " + " | ".join(name for name, _ in SHOWN.values()) + " | " + " | ".join(LAST) + " |")
    print("| --- " * (3 + len(SHOWN) + len(LAST)) + "|")
    for arm, by_seed in runs.items():
        cells = [arm, str(len(by_seed)), str(min(steps[-1]["step"] for _, steps in by_seed.values()))]
        for metric, (_, unit) in SHOWN.items():
            before, after = (unit * fmean(evals[end][metric] for evals, _ in by_seed.values()) for end in (0, -1))
            cells.append(f"{before:.1f} -> {after:.1f}")
        for metric in LAST:
            tails = [steps[-max(1, len(steps) // 5) :] for _, steps in by_seed.values()]
            cells.append(f"{fmean(row[metric] for tail in tails for row in tail):.2f}")
        print("| " + " | ".join(cells) + " |")
    first = next(iter(runs), None)
    for arm, by_seed in runs.items():
        both = sorted(by_seed.keys() & runs[first].keys())
        gains = [100 * (by_seed[s][0][-1]["eval/accuracy"] - by_seed[s][0][0]["eval/accuracy"]) for s in both]
        theirs = [100 * (runs[first][s][0][-1]["eval/accuracy"] - runs[first][s][0][0]["eval/accuracy"]) for s in both]
        if both:
            more = [a - b for a, b in zip(gains, theirs, strict=True)]
            print(f"{arm}: strict accuracy {interval(gains)} points; against {first} {interval(more)}")


def main() -> None:
    ours, _, common = [list(part) for part in (sys.argv[1:], [], [])]
    if "--" in ours:
        ours, common = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args(ours)
    if not args.report:
        run(args.folder, args.arms, args.seeds, common)
    report(args.folder)


if __name__ == "__main__":
    main()
