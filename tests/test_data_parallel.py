"""Several processes against one: the same problems, completions, rewards, gradient and weights, up to rounding."""

import hashlib
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import src.grpo
from src.cold_start import ColdStart, target_batch
from src.data import SYSTEM_PROMPT, Example
from src.engine.lora import add_lora
from src.engine.processes import Processes
from src.engine.sampling import Sampler
from src.evaluation import Evaluation, evaluate
from src.grpo import GRPOConfig, GRPOTrainer
from src.reward_set import Reward, RewardSet
from tests.helpers import assert_same, tiny_model, word_tokenizer
from tests.ranks import on_each

PROBLEMS = [Example(f"Tom has {n} apples. How many?", f"{n} + 1", "", str(n)) for n in (3, 4, 15, 7, 20, 9, 11, 30)]
OTHERS = [Example(f"He finds {n} apples. How many now?", "", "", str(n)) for n in range(20, 28)]
TOKENIZER, END_IDS, LONGEST = word_tokenizer(), [1, 5, 13, 34, 55], 8

BASE = {"prompts_per_step": 5, "group_size": 3, "max_completion_tokens": LONGEST, "temperature": 0.7}
BASE |= {"kl_coef": 0.0, "warmup_steps": 0, "learning_rate": 1e-2, "token_budget": 64}
CASES: dict[str, dict[str, Any]] = {
    "tokens": {},
    "rows, divided": {"loss_type": "grpo", "scale_advantages": True},
    "longest length": {"loss_type": "dr_grpo"},
    "KL": {"kl_coef": 0.3},
    "KL, two updates": {"kl_coef": 0.3, "updates_per_rollout": 2, "clip_eps": 0.01},
    "masked rows": {"mask_truncated": True},
    "dynamic sampling": {"dynamic_sampling": 3},
    "LoRA": {"kl_coef": 0.3, "lora": 2},
    "fewer problems than processes": {"prompts_per_step": 2},
    "no signal": {"reward": lambda completion: 1.0},
}


def chance(completion: str) -> float:
    """A reward that looks at nothing but the text, and differs between texts."""
    return hashlib.sha256(completion.encode()).digest()[0] / 255


def make_trainer(processes: Processes, case: dict[str, Any]) -> GRPOTrainer:
    settings = BASE | case
    model = tiny_model("qwen2")
    if rank := settings.pop("lora", None):
        add_lora(model, rank, 0)
    rewards = RewardSet((Reward("chance", 1.0, settings.pop("reward", chance)),))
    config = GRPOConfig(**settings)
    return GRPOTrainer(model, TOKENIZER, Sampler(model, END_IDS, 0), config, 0, rewards, processes=processes)


def train(processes: Processes, case: dict[str, Any]) -> dict[str, Any]:
    """Two steps: their metrics and completions, the gradients that the optimizer saw, the weights afterwards."""
    trainer, seen = make_trainer(processes, case), []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *given: (seen.append(masters_gradients(trainer)), step(*given))[1]
    count, metrics, rollouts = trainer.config.prompts_per_step, [], []
    src.grpo.answer_accuracy = lambda completion, answer: float(chance(completion) > 0.5)
    for number in range(2):
        values, rollout = trainer.step(number, PROBLEMS[:count], lambda attempt: OTHERS[attempt : attempt + count])
        metrics.append(measured(values))
        rollouts.append((rollout.sampled.ids.tolist(), rollout.texts, [example.answer for example in rollout.examples]))
    return {"metrics": metrics, "rollouts": rollouts, "gradients": seen, "weights": masters(trainer)}


def measured(metrics: dict[str, float]) -> dict[str, float]:
    """Without what depends on the machine."""
    return {name: value for name, value in metrics.items() if "second" not in name and name != "peak_memory"}


def masters(trainer: GRPOTrainer) -> dict[str, Tensor]:
    return {name: master.detach().clone() for name, master in trainer.optimizer.master.items()}


def masters_gradients(trainer: GRPOTrainer) -> dict[str, Tensor]:
    return {name: master.grad.clone() for name, master in trainer.optimizer.master.items() if master.grad is not None}


def warm_up(processes: Processes, batch_size: int) -> dict[str, Any]:
    """Two steps of the cold start."""
    trainer, metrics = ColdStart(tiny_model("qwen2"), 1.0, 64, processes), []
    for start in range(2):
        batch = target_batch(TOKENIZER, PROBLEMS[start : start + batch_size], 0, torch.device("cpu"), SYSTEM_PROMPT)
        metrics.append(measured(trainer.step(batch, 1e-2)))
    return {"metrics": metrics, "weights": masters(trainer)}


def answer(processes: Processes, count: int, **settings: Any) -> Evaluation:
    sampler = Sampler(tiny_model("qwen2"), END_IDS, 0)
    return evaluate(sampler, TOKENIZER, PROBLEMS[:count], LONGEST, **settings, processes=processes)


def everything(processes: Processes) -> dict[str, Any]:
    results: dict[str, Any] = {name: train(processes, case) for name, case in CASES.items()}
    results |= {f"cold start on {size}": warm_up(processes, size) for size in (2, 5)}
    results |= {f"greedy on {count}": answer(processes, count) for count in (1, 7)}
    return results | {"sampled": answer(processes, 5, k=3, temperature=0.9, seed=1)}


@cache
def done(world: int) -> list[dict[str, Any]]:
    """Everything, on each of so many processes."""
    return on_each(world, everything)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 3])
class TestGRPO:
    def test_problems_and_completions_are_those_of_one_process(self, world: int, case: str) -> None:
        (one,) = done(1)
        for result in done(world):
            assert result[case]["rollouts"] == one[case]["rollouts"]

    def test_gradients_weights_and_metrics_are_those_of_one_process(self, world: int, case: str) -> None:
        (one,), (first, *_) = done(1), done(world)
        for actual, expected in zip(first[case]["gradients"], one[case]["gradients"], strict=True):
            assert_same(actual, expected) if expected else not actual
        for actual, expected in zip(first[case]["metrics"], one[case]["metrics"], strict=True):
            assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert_same(first[case]["weights"], one[case]["weights"], 1e-3)

    def test_all_processes_end_with_the_same_bits(self, world: int, case: str) -> None:
        first, *others = done(world)
        for other in others:
            assert all(torch.equal(first[case]["weights"][n], w) for n, w in other[case]["weights"].items())
            assert other[case]["metrics"] == first[case]["metrics"]


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("world", [2, 3])
def test_the_cold_start_is_that_of_one_process(world: int, size: int) -> None:
    one, first, *others = (result[f"cold start on {size}"] for result in done(1) + done(world))
    for actual, expected in zip(first["metrics"], one["metrics"], strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)
    assert_same(first["weights"], one["weights"], 1e-3)
    assert all(torch.equal(first["weights"][n], w) for other in others for n, w in other["weights"].items())


@pytest.mark.parametrize("name", ["greedy on 1", "greedy on 7", "sampled"])
@pytest.mark.parametrize("world", [2, 3])
def test_every_process_has_the_evaluation_of_one(world: int, name: str) -> None:
    (one,) = done(1)
    assert [result[name] for result in done(world)] == [one[name]] * world


def test_the_cases_are_what_they_say() -> None:
    (one,) = done(1)
    last = {name: one[name]["metrics"][-1] for name in CASES}
    assert last["no signal"]["skipped_steps"] == 2 and not any(one["no signal"]["gradients"])
    assert last["KL, two updates"]["clip_fraction"] > 0 and last["KL"]["kl"] > 0
    assert 0 < last["masked rows"]["truncated"] < 1
    drawn = {answer for _, _, answers in one["dynamic sampling"]["rollouts"] for answer in answers}
    assert drawn & {example.answer for example in OTHERS} - {example.answer for example in PROBLEMS}
