"""benchmarks/check_gpu.py on the stand-in: it runs from end to end, and says what is wrong."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import check_gpu
from tests.helpers import tiny_model
from tests.pretend_gpu import PretendGPU

SMALL = "--model tiny --prompts_per_step 2 --group_size 4 --max_completion_tokens 12 --steps 3 --buffer_mb 1 --width 64"
PARTS = ("sampling", "scoring", "reference", "learning", "optimizer")
GOOD = [{"skipped_steps": 0.0, "logp_gap": 0.01, "loss": 0.5}] * 2


def test_it_takes_real_steps_and_ends_with_one_line_for_programs(
    gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_gpu, "run_tests", lambda: "7 passed, 900 deselected in 3.21s")
    assert check_gpu.main(SMALL.split()) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["device"].startswith("cuda (") and result["tests"].startswith("7 passed")
    assert all(result[f"seconds/{part}"] > 0 for part in PARTS) and result["skipped_steps"] == 0
    assert result["seconds"] == pytest.approx(sum(result[f"seconds/{part}"] for part in PARTS), rel=0.5)
    rows = [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("|")]
    assert rows == ["part", "---", *PARTS, "waiting", "step"]
    assert "nothing is wrong" in lines


def test_random_weights_end_by_chance_and_learn_without_a_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(check_gpu, "report", lambda steps, least: seen.extend(steps) or {})
    flags = SMALL.replace("--model tiny", "--shape small --device cpu").replace("12", "120")
    assert check_gpu.main(flags.split()) == 0
    assert all(0 < step["completion_tokens"] < 120 and step["grad_norm"] > 0 for step in seen) and len(seen) == 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tests"] is None


@pytest.mark.parametrize(
    ("change", "tests", "wrong"),
    [
        ({}, "7 passed in 3.21s", []),
        ({}, None, []),
        ({}, "not as expected: 1 failed, 6 passed in 3.21s", ["the tests: not as expected: 1 failed"]),
        ({}, "900 deselected in 3.21s", ["the tests: 900 deselected"]),
        ({"loss": float("nan")}, None, ["a metric is not finite"]),
        ({"skipped_steps": 2.0}, None, ["2 steps were skipped"]),
        ({"logp_gap": 0.2}, None, ["sampler and learner differ by 0.200 a token"]),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, float], tests: str | None, wrong: list[str]) -> None:
    found = check_gpu.complaints([*GOOD, GOOD[0] | change], tests)
    assert len(found) == len(wrong) and all(f.startswith(w) for f, w in zip(found, wrong, strict=True))


def test_the_floors_are_bytes_and_products_over_what_the_card_reaches() -> None:
    # 97 x 32 numbers in the tied head; 9,280 in each of two layers and 32 in the last norm. A column of keys and values
    # has 2 layers x 2 x 2 heads x 8 numbers. Two prompts of 20 tokens, 8 rows, each number of 4 bytes;
    # of the 20 both begin with the same 5.
    head, body = 97 * 32, 2 * 9280 + 32
    args = SimpleNamespace(prompts_per_step=2, group_size=4)
    step = {"prompt_tokens": 40.0, "shared_tokens": 10.0, "completion_tokens": 10.0, "completion_tokens_max": 12.0}
    once = 2 * ((body + head) * 80 + body * 35)
    assert check_gpu.floors(tiny_model("llama"), step, args, speed=100.0, rate=10.0) == pytest.approx(
        {
            "sampling": 12 * 4 * (body + head + 8 * 25 * 64) / 100,
            "reference": once / 10,
            "learning": 3 * once / 10,
            "optimizer": 30 * (body + head) / 100,
        }
    )
