"""What is told of a step: its metrics, and the group shown in the logs."""

import pytest
import torch

from src.data import Example
from src.engine.kv_cache import left_pad
from src.engine.logprobs import Batch
from src.engine.sampling import Completions
from src.rollout import Rollout, masked_mean

NAMES = ["formatting", "answer_accuracy"]
SUM, PLAIN = "<reasoning>3 + 4 = 7</reasoning>", "<reasoning>seven</reasoning>"


def make_rollout() -> Rollout:
    """Two problems, two completions each, of 3, 1, 2 and 3 tokens."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]) > 0
    ids, logps = torch.arange(12).view(4, 3), torch.full((4, 3), -0.5).where(mask, 0.0)
    sampled = Completions(ids, mask, logps, torch.tensor([True, False, False, False]))
    batch = Batch(*left_pad([[5, 6], [7, 8, 9]], 0, "cpu"), ids, mask)
    examples = [Example("3 and 4?", "", "", "7"), Example("1 and 1?", "", "", "2")]
    scores = torch.tensor([[1.0, 1.0], [0.5, 0.0], [0.0, 0.0], [0.0, 0.0]])
    return Rollout(examples, batch, sampled, [SUM, SUM, PLAIN, SUM], scores, scores[:, 1] == 1)


def test_metrics_are_means_over_the_step() -> None:
    metrics = make_rollout().metrics(torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, -1.0, 0.0, 0.0]), NAMES)
    expected = {
        "reward": 1.0,
        "reward_std": 2**0.5,  # sum of squares 6 over n - 1 = 3
        "reward/formatting": 0.375,
        "reward/answer_accuracy": 0.25,
        "accuracy": 0.25,
        "zero_signal_groups": 0.5,
        "wrong_advantage": 0.0,
        "no_calculation": 0.25,
        "entropy": 0.5,
        "completion_tokens": 9 / 4,
        "completion_tokens_max": 3.0,
        "truncated": 0.25,
    }
    assert metrics == pytest.approx(expected)


@pytest.mark.parametrize(
    ("advantages", "share"),
    [([0.5, -0.5, 0.25, -0.25], 1 / 3), ([-0.5, 0.5, 0.0, 0.0], 1.0), ([0.0] * 4, 0.0)],
)
def test_the_share_of_the_gain_that_goes_to_wrong_answers(advantages: list[float], share: float) -> None:
    metrics = make_rollout().metrics(torch.zeros(4), torch.tensor(advantages), NAMES)
    assert metrics["wrong_advantage"] == pytest.approx(share)


def test_a_group_is_mixed_when_some_of_its_answers_are_right() -> None:
    assert make_rollout().mixed_groups().tolist() == [True, False]


def test_the_description_is_of_the_first_problems_group() -> None:
    first, second = make_rollout().describe(torch.tensor([2.5, 0.5, 0.0, 0.0]), NAMES)
    assert first == {
        "question": "3 and 4?",
        "answer": "7",
        "completion": SUM,
        "reward": 2.5,
        "rewards": {"formatting": 1.0, "answer_accuracy": 1.0},
        "correct": True,
        "truncated": True,
    }
    assert (second["reward"], second["correct"], second["truncated"]) == (0.5, False, False)


def test_a_masked_mean_is_over_the_masked_values_and_zero_over_none():
    values, mask = torch.tensor([[1.0, 2.0], [30.0, 4.0]]), torch.tensor([[True, True], [False, True]])
    assert masked_mean(values, mask) == pytest.approx(7 / 3)
    assert masked_mean(values, mask & False) == 0
