"""A whole step of the trainer: rollouts, dynamic sampling, metrics, settings; and on CUDA."""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from src.data import Example, encode_prompts
from src.engine.logprobs import Batch
from src.engine.sampling import Completions, decode
from src.errors import UserError
from src.grpo import GRPOConfig, GRPOTrainer, Rollout
from src.reward_set import RewardSet, built_in
from tests.helpers import plain_logps, tiny_model
from tests.test_grpo import EXAMPLES, GROUP, TOTALS, make_rollout, make_trainer, weights_of

Scores = Callable[[int, int], list[float]]  # attempt, number of completions -> the totals


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scores], list[tuple[list[str], list[str]]]]:
    """Rewards as a test wants them, all in the last column; returns what the scorer was given."""

    def install(totals: Scores) -> list[tuple[list[str], list[str]]]:
        calls: list[tuple[list[str], list[str]]] = []

        def score(rewards: RewardSet, texts: list[str], problems: list[Example], *_: Any) -> list[list[float]]:
            calls.append((texts, [problem.answer for problem in problems]))
            return [[0.0, 0.0, 0.0, total] for total in totals(len(calls) - 1, len(texts))]

        monkeypatch.setattr(RewardSet, "score", score)
        return calls

    return install


def texts_of(trainer: GRPOTrainer, rollout: Rollout) -> list[str]:
    return decode(trainer.tokenizer, rollout.sampled)


class TestRollOut:
    def test_a_rollout_is_a_function_of_seed_and_step(self):
        def completions(seed: int, step: int) -> list[list[int]]:
            return make_trainer(seed=seed).roll_out(step, EXAMPLES).sampled.ids.tolist()

        assert completions(0, 4) == completions(0, 4)
        assert completions(0, 4) != completions(0, 5) and completions(0, 4) != completions(1, 4)

    def test_every_completion_is_scored_with_the_answer_of_its_problem(self, scored):
        trainer, calls = make_trainer(), scored(lambda attempt, rows: [float(row) for row in range(rows)])
        rollout = trainer.roll_out(0, EXAMPLES)
        assert calls == [(texts_of(trainer, rollout), ["3", "3", "3", "4", "4", "4", "15", "15", "15"])]
        assert rollout.totals([0, 0, 0, 2.0]).tolist() == [2.0 * row for row in range(9)]
        prompts = encode_prompts(trainer.tokenizer, [example.question for example in EXAMPLES])
        padded = (rollout.batch.prompt_ids, rollout.batch.prompt_mask)
        assert [ids[mask].tolist() for ids, mask in zip(*padded, strict=True)] == prompts
        assert rollout.batch.completion_ids is rollout.sampled.ids
        assert rollout.batch.completion_mask is rollout.sampled.mask

    def test_the_log_probabilities_are_those_at_the_sampling_temperature(self):
        trainer = make_trainer(temperature=1.3)
        rollout = trainer.roll_out(0, EXAMPLES)
        prompts = encode_prompts(trainer.tokenizer, [example.question for example in EXAMPLES])
        s = rollout.sampled
        for b, mask in enumerate(s.mask):
            expected = plain_logps(trainer.model, prompts[b // GROUP], s.ids[b, mask].tolist(), 1.3).detach()
            torch.testing.assert_close(s.logps[b, mask], expected, atol=1e-4, rtol=0)

    def test_the_total_is_the_weighted_sum_of_the_rewards(self):
        trainer = make_trainer()
        rollout = replace(make_rollout(trainer), rewards=torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 1.0, 1.0]]))
        assert rollout.totals([0.3, 0.5, 0.5, 2.0]).tolist() == pytest.approx([0.55, 3.0])

    def test_the_description_is_of_the_first_problem_s_group(self):
        trainer = make_trainer()
        rollout = replace(make_rollout(trainer), texts=[f"text {b}" for b in range(9)])
        rows = rollout.describe("How many?", "3", built_in([0, 0, 0, 1.0]))
        assert [row["completion"] for row in rows] == ["text 0", "text 1", "text 2"]
        assert [row["reward"] for row in rows] == pytest.approx(TOTALS[:3])
        assert [row["rewards"]["answer_accuracy"] for row in rows] == pytest.approx(TOTALS[:3])
        assert [row["truncated"] for row in rows] == rollout.sampled.truncated[:3].tolist()
        assert all(row["question"] == "How many?" and row["answer"] == "3" for row in rows)


class TestDynamicSampling:
    LIVELY, DULL = [1.0, 0.0, 0.5], [0.3, 0.3, 0.3]

    def totals(self, attempt: int, rows: int) -> list[float]:
        """At first the last group alone has signal; then the second gets some; the first never does."""
        return [[*self.DULL, *self.DULL, *self.LIVELY], [*self.DULL, *self.LIVELY], self.DULL, self.DULL][attempt]

    @pytest.mark.parametrize(("times", "calls"), [(0, 1), (1, 2), (2, 3), (3, 4)])
    def test_dull_groups_alone_are_sampled_anew_a_bounded_number_of_times(self, times: int, calls: int, scored):
        given = scored(self.totals)
        make_trainer(dynamic_sampling=times).roll_out(0, EXAMPLES)
        answers = [["3"] * 3 + ["4"] * 3 + ["15"] * 3, ["3"] * 3 + ["4"] * 3, ["3"] * 3, ["3"] * 3]
        assert [answer for _, answer in given] == answers[:calls]

    def test_new_groups_take_the_place_of_the_dull_ones_and_the_others_are_kept(self, scored):
        scored(self.totals)
        first = make_trainer(dynamic_sampling=0).roll_out(0, EXAMPLES)
        calls = scored(self.totals)
        trainer = make_trainer(dynamic_sampling=2)
        rollout = trainer.roll_out(0, EXAMPLES)
        assert rollout.rewards[:, 3].tolist() == pytest.approx([*self.DULL, *self.LIVELY, *self.LIVELY])
        assert rollout.texts == calls[2][0] + calls[1][0][3:] + calls[0][0][6:]
        assert texts_of(trainer, rollout) == rollout.texts
        assert len({tuple(texts[:3]) for texts, _ in calls}) == 3  # each time new samples
        for name in ("ids", "mask", "logps", "truncated"):
            old, new = getattr(first.sampled, name), getattr(rollout.sampled, name)
            assert torch.equal(new[6:], old[6:])
        assert torch.equal(rollout.batch.prompt_ids, first.batch.prompt_ids)
        assert torch.equal(rollout.batch.completion_ids, rollout.sampled.ids)
        assert torch.equal(rollout.batch.completion_mask, rollout.sampled.mask)
        assert trainer.learn(rollout, lr=1e-3)["logp_gap"] < 1e-4  # every row still belongs to its prompt

    def test_groups_that_all_have_signal_are_sampled_once(self, scored):
        calls = scored(lambda attempt, rows: self.LIVELY * 3)
        make_trainer(dynamic_sampling=5).roll_out(0, EXAMPLES)
        assert len(calls) == 1


class TestStep:
    def test_its_metrics_are_those_of_the_rollout(self, scored):
        scored(lambda attempt, rows: [1.0, 0.0, 0.5, 0.3, 0.3, 0.3, 2.0, 2.0, 0.5])
        trainer = make_trainer(reward_weights=[0.0, 0.0, 0.0, 2.0])
        metrics, rollout = trainer.step(0, EXAMPLES)
        totals = [2.0, 0.0, 1.0, 0.6, 0.6, 0.6, 4.0, 4.0, 1.0]
        lengths = rollout.sampled.mask.sum(-1).tolist()
        picked = rollout.sampled.logps[rollout.sampled.mask]
        expected = {
            "reward": statistics.mean(totals),
            "reward_std": statistics.stdev(totals),
            "reward/answer_accuracy": statistics.mean(totals) / 2,
            "reward/formatting": 0.0,
            "zero_signal_groups": 1 / 3,
            "entropy": -float(picked.mean()),
            "completion_tokens": statistics.mean(lengths),
            "completion_tokens_max": max(lengths),
            "truncated": statistics.mean(rollout.sampled.truncated.tolist()),
            "lr": 1e-2,
            "tokens_per_second": sum(lengths) / metrics["seconds"],
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(expected)
        assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
        parts = ("sampling", "scoring", "reference", "learning", "optimizer")
        seconds = [metrics[f"seconds/{part}"] for part in parts]
        assert sum(seconds) == pytest.approx(metrics["seconds"])
        assert [part for part, taken in zip(parts, seconds, strict=True) if not taken] == ["reference"]

    def test_it_trains(self, scored):
        scored(lambda attempt, rows: [float(row % 3) for row in range(rows)])
        trainer = make_trainer()
        before = weights_of(trainer)
        metrics, _ = trainer.step(0, EXAMPLES)
        assert metrics["grad_norm"] > 0 and metrics["skipped_steps"] == 0
        assert all(not torch.equal(param, before[name]) for name, param in trainer.model.named_parameters())

    @pytest.mark.parametrize(("warmup", "rates"), [(0, [1e-2] * 4), (1, [1e-2] * 4), (4, [2.5e-3, 5e-3, 7.5e-3, 1e-2])])
    def test_the_learning_rate_rises_to_its_value_and_stays(self, warmup: int, rates: list[float]):
        trainer = make_trainer(warmup_steps=warmup)
        assert [trainer.learning_rate(step) for step in range(4)] == pytest.approx(rates)
        assert trainer.learning_rate(10**6) == 1e-2


class TestConfig:
    NONSENSE = (
        ("prompts_per_step", 0),
        ("group_size", 1),
        ("max_prompt_tokens", 1),
        ("max_completion_tokens", 0),
        ("updates_per_rollout", 0),
        ("token_budget", 0),
        ("warmup_steps", -1),
        ("dynamic_sampling", -1),
        ("kl_coef", -0.1),
        ("kl_coef", math.nan),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("max_grad_norm", 0.0),
        ("clip_eps", 0.0),
        ("clip_eps", 1.0),
        ("clip_eps_high", 0.0),
        ("clip_eps_high", math.nan),
        ("loss_type", "ppo"),
        ("reward_weights", [1.0, 2.0]),
        ("reward_weights", [1.0, 2.0, 3.0, math.nan]),
        ("reward_weights", [1.0, 2.0, 3.0, math.inf]),
    )

    @pytest.mark.parametrize(("name", "value"), NONSENSE)
    def test_nonsense_is_refused_with_one_line_that_names_flag_and_value(self, name: str, value: Any):
        with pytest.raises(UserError) as caught:
            GRPOConfig(**{name: value})
        message = str(caught.value)
        assert message.startswith(f"--{name} is {value}: ") and "\n" not in message

    def test_the_defaults_and_the_limits_are_accepted(self):
        GRPOConfig()
        GRPOConfig(group_size=2, max_prompt_tokens=2, kl_coef=0, warmup_steps=0, clip_eps=0.99, clip_eps_high=0.01)


def test_a_step_on_cuda_in_half_precision_moves_the_masters(gpu, scored):
    scored(lambda attempt, rows: [float(row % 3) for row in range(rows)])
    trainer = make_trainer(tiny_model("qwen2").cuda().bfloat16(), kl_coef=0.04, learning_rate=1e-6)
    before = {name: master.clone() for name, master in trainer.optimizer.master.items()}
    metrics = [trainer.step(step, EXAMPLES)[0] for step in range(3)]
    assert all(math.isfinite(value) for step in metrics for value in step.values())
    assert metrics[-1]["skipped_steps"] == 0 and metrics[0]["logp_gap"] < 0.05
    moved = [(master != before[name]).float().mean() for name, master in trainer.optimizer.master.items()]
    assert min(moved) > 0.5


def test_learning_on_cuda_is_the_cpu_s_and_the_sampler_follows(gpu):
    settings = {"kl_coef": 0.04, "updates_per_rollout": 2}
    here, there = make_trainer(**settings), make_trainer(tiny_model("qwen2").cuda(), **settings)
    for _ in range(2):
        make_rollout(there)  # captures the graphs that later weights have to reach
        given = make_rollout(here)
        batch, sampled = ([tensor.cuda() for tensor in vars(part).values()] for part in (given.batch, given.sampled))
        same = Rollout(Batch(*batch), Completions(*sampled), given.texts, given.rewards.cuda())
        metrics = [trainer.learn(rollout, 1e-3) for trainer, rollout in ((here, given), (there, same))]
        for name in ("loss", "kl", "grad_norm", "clip_fraction"):
            assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-2, abs=1e-5), name
    here.model.load_state_dict({name: value.cpu() for name, value in there.model.state_dict().items()})
    assert torch.equal(make_rollout(there).sampled.ids.cpu(), make_rollout(here).sampled.ids)
