"""The tables of docs/flags.md and docs/metrics.md against the fields of the settings and a real run, both ways."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from src.grpo import GRPOConfig
from src.rewards import REWARD_FUNCTIONS
from src.settings import TrainConfig
from tests.helpers import load_script, write_sums

DOCS = Path(__file__).parents[1] / "docs"


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    text = (DOCS / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def flags(*kinds: type) -> Iterator[tuple[str, str, str, bool]]:
    """Each flag as a page should have it, and whether a resumed run is free to change it."""
    for f in (f for kind in kinds for f in fields(kind) if f.init):
        default = f.default_factory()
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        shown = {"None": "", "True": "true", "False": "false"}.get(shown, shown)
        yield f"`--{f.name}`", shown, f.metadata["help"], not f.metadata["alters"]


def test_the_flags_of_training_are_those_of_the_page_each_with_its_default_help_and_freedom() -> None:
    expected = [[*cells, "yes" if free else ""] for *cells, free in flags(TrainConfig, GRPOConfig)]
    assert rows("flags.md", "train.py") == expected


def test_the_flags_of_an_evaluation_are_those_of_the_page() -> None:
    kind = load_script("test").TestConfig
    assert rows("flags.md", "test.py") == [cells for *cells, _ in flags(kind)]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The metrics of a short run with every phase."""
    folder = tmp_path_factory.mktemp("run")
    write_sums(folder / "data")
    places = ["--dataset", folder / "data", "--checkpoint_dir", folder / "checkpoints", "--log_dir", folder / "logs"]
    short = "--preset tiny --cold_start_steps 1 --cold_start_batch_size 4 --max_steps 2 --prompts_per_step 2"
    short += " --group_size 2 --max_completion_tokens 4 --eval_samples 2 --device cpu"
    assert load_script("train").main([*short.split(), *map(str, places)]) == 0
    return [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_metrics_of_a_run_are_those_of_the_page_phase_by_phase(lines: list[dict]) -> None:
    explained = {
        (phase, name.replace("NAME", reward.__name__))
        for names, phases, _ in rows("metrics.md", "Metrics")
        for phase in phases.split(", ")
        for name in re.findall("`([^`]+)`", names)
        for reward in REWARD_FUNCTIONS
    }
    assert {(line["phase"], name) for line in lines for name in line.keys() - {"phase", "step"}} == explained
