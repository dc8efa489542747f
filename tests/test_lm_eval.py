"""Strict and lenient accuracy against the GSM8K filters of EleutherAI's lm-eval, on the same completions.

The cases are those of the table in docs/evaluation.md, the filters those of docs/gsm8k_xml.yaml, applied here
as lm-eval 0.4.13 does. Where it is installed, its own code is asked, too.
"""

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from src.data import format_target, load_examples
from src.evaluation import last_number_is
from src.rewards import answer_accuracy

DOCS = Path(__file__).parent.parent / "docs"
TASK = yaml.safe_load((DOCS / "gsm8k_xml.yaml").read_text(encoding="utf-8"))
FILTERS = {entry["name"]: {**entry["filter"][0]} for entry in TASK["filter_list"]}
METRIC = {**TASK["metric_list"][0]}


class Case(NamedTuple):
    """A row of the documented table: a completion's end, the truth, and four verdicts."""

    completion: str
    truth: str
    strict: bool
    strict_lm_eval: bool
    lenient: bool
    lenient_lm_eval: bool


def documented_cases() -> list[Case]:
    lines = (DOCS / "evaluation.md").read_text(encoding="utf-8").splitlines()
    table = [line.split("|")[1:-1] for line in lines if line.startswith("| `")]
    rows = [[cell.strip() for cell in cells[:6]] for cells in table if len(cells) == 7]
    return [Case(row[0].strip("`"), row[1].strip("`"), *(cell == "right" for cell in row[2:])) for row in rows]


CASES = documented_cases()


def ours(completion: str, truth: str) -> tuple[bool, bool]:
    return answer_accuracy(completion, truth) == 1.0, last_number_is(completion, truth)


def lm_evals(completion: str, truth: str) -> tuple[bool, bool]:
    """Its regex filter and its exact_match, told again."""
    verdicts = []
    for name in ("strict-match", "flexible-extract"):
        found = re.findall(FILTERS[name]["regex_pattern"], completion)
        match = found[FILTERS[name].get("group_select", 0)] if found else "[invalid]"
        given = next(filter(None, match)) if isinstance(match, tuple) else match
        texts = [given.strip(), truth]
        for regex in METRIC["regexes_to_ignore"]:
            texts = [re.sub(regex, "", text) for text in texts]
        verdicts.append(texts[0].lower() == texts[1].lower())
    return verdicts[0], verdicts[1]


def test_the_documented_table_has_agreements_and_differences_of_both_kinds() -> None:
    assert len(CASES) >= 20
    assert {case[2:] for case in CASES} >= {(True, True, True, True), (False, False, False, False)}
    assert any(case.strict != case.strict_lm_eval for case in CASES)
    assert any(case.lenient != case.lenient_lm_eval for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.completion for case in CASES])
def test_each_verdict_is_as_documented(case: Case) -> None:
    assert ours(case.completion, case.truth) == (case.strict, case.lenient)
    assert lm_evals(case.completion, case.truth) == (case.strict_lm_eval, case.lenient_lm_eval)


@pytest.mark.parametrize("dataset", ["synthetic", os.environ.get("GSM8K_DIR", "")])
def test_on_every_solution_in_the_exact_form_all_agree(dataset: str) -> None:
    if not dataset:
        pytest.skip("GSM8K_DIR names no data")
    examples, _ = load_examples(dataset, "test")
    wrong = [(format_target(a), b.answer) for a, b in pairwise(examples) if a.answer != b.answer]
    for completion, truth in [(format_target(e), e.answer) for e in examples] + wrong:
        assert ours(completion, truth) == lm_evals(completion, truth), (completion, truth)


class TestItsOwnCode:
    """What is told again above is what lm-eval does."""

    def test_the_filters_are_those_of_its_gsm8k_task(self):
        folder = Path(pytest.importorskip("lm_eval").__file__).parent
        task = yaml.safe_load((folder / "tasks" / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8"))
        theirs = {entry["name"]: entry["filter"][0] for entry in task["filter_list"]}
        assert FILTERS["flexible-extract"] == theirs["flexible-extract"]
        # The strict one reads the answer field in place of what follows "#### ".
        number = r"(\-?[0-9\.\,]+)"
        assert theirs["strict-match"]["regex_pattern"] == f"#### {number}"
        assert FILTERS["strict-match"]["regex_pattern"] == rf"<answer>\s*{number.replace('[', '[$')}\s*</answer>"
        assert TASK["metric_list"] == task["metric_list"]

    def test_its_filter_and_its_metric_say_the_same(self):
        extraction = pytest.importorskip("lm_eval.filters.extraction")
        metrics = pytest.importorskip("lm_eval.api.metrics")
        options = {key: METRIC[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
        for index, name in enumerate(("strict-match", "flexible-extract")):
            settings = {key: value for key, value in FILTERS[name].items() if key != "function"}
            given = extraction.RegexFilter(**settings).apply([[case.completion] for case in CASES], [{}] * len(CASES))
            for case, (text,) in zip(CASES, given, strict=True):
                match = metrics.exact_match_hf_evaluate([text], [case.truth], **options)["exact_match"]
                assert bool(match) == lm_evals(case.completion, case.truth)[index], case
