"""A whole step of the trainer: rollouts, dynamic sampling, metrics, settings; and on CUDA."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import src.grpo
from src.data import Example, encode_prompts
from src.engine.kv_cache import unpad
from src.engine.logprobs import Batch
from src.engine.sampling import Completions, decode
from src.errors import UserError
from src.grpo import GRPOConfig, GRPOTrainer
from src.reward_set import Reward, RewardSet
from src.rollout import Rollout
from tests.helpers import plain_logps, tiny_model
from tests.test_grpo import EXAMPLES, GROUP, learn, make_rollout, make_trainer, weights_of

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
    return decode(trainer.tokenizer, unpad(rollout.sampled.ids, rollout.sampled.mask))


def roll_out(trainer: GRPOTrainer, step: int) -> Rollout:
    return trainer.score(EXAMPLES, *trainer.sample(step, 0, EXAMPLES))


class TestSampleAndScore:
    def test_samples_are_a_function_of_seed_step_and_attempt(self):
        def completions(seed: int, step: int, attempt: int = 0) -> list[list[int]]:
            return make_trainer(seed=seed).sample(step, attempt, EXAMPLES)[1].ids.tolist()

        assert completions(0, 4) == completions(0, 4)
        assert completions(0, 4) not in (completions(0, 5), completions(1, 4), completions(0, 4, 1))

    def test_every_completion_is_scored_with_the_answer_of_its_problem(self, scored):
        trainer, calls = make_trainer(), scored(lambda attempt, rows: [float(row) for row in range(rows)])
        rollout = roll_out(trainer, 0)
        assert calls == [(texts_of(trainer, rollout), ["3", "3", "3", "4", "4", "4", "15", "15", "15"])]
        assert rollout.scores.tolist() == [[0.0, 0.0, 0.0, float(row)] for row in range(9)]
        prompts = encode_prompts(trainer.tokenizer, [example.question for example in EXAMPLES])
        padded = (rollout.batch.prompt_ids, rollout.batch.prompt_mask)
        assert [ids[mask].tolist() for ids, mask in zip(*padded, strict=True)] == prompts
        assert rollout.batch.completion_ids is rollout.sampled.ids
        assert rollout.batch.completion_mask is rollout.sampled.mask

    def test_what_is_right_depends_on_the_answer_alone_not_on_what_is_rewarded(self, scored, monkeypatch):
        scored(lambda attempt, rows: [0.0] * rows)
        texts = [f"<answer>{n}</answer>" for n in (3, 4, 4, 4, 4, 5, 3, 15, 16)]
        monkeypatch.setattr(src.grpo, "decode", lambda *_: texts)
        right = [True, False, False, True, True, False, False, True, False]
        assert roll_out(make_trainer(), 0).right.tolist() == right

    def test_the_log_probabilities_are_those_at_the_sampling_temperature(self):
        trainer = make_trainer(temperature=1.3)
        rollout = roll_out(trainer, 0)
        prompts = encode_prompts(trainer.tokenizer, [example.question for example in EXAMPLES])
        s = rollout.sampled
        for b, mask in enumerate(s.mask):
            expected = plain_logps(trainer.model, prompts[b // GROUP], s.ids[b, mask].tolist(), 1.3).detach()
            torch.testing.assert_close(s.logps[b, mask], expected, atol=1e-4, rtol=0)


class TestDynamicSampling:
    """Other problems in place of those whose answers are all right or all wrong."""

    RIGHT, WRONG, MIXED = [1.0] * GROUP, [0.0] * GROUP, [1.0, 0.0, 0.0]
    OTHERS = tuple(Example(f"He finds {n} apples. How many now?", "", "", str(n)) for n in range(20, 26))

    def step(
        self, monkeypatch: pytest.MonkeyPatch, verdicts: list[list[float]], times: int = 3, others: Sequence = OTHERS
    ) -> tuple[Rollout, list]:
        """A step in which the groups sampled turn out like this, one after the other; and which were sampled."""
        trainer, verdicts, asked = make_trainer(dynamic_sampling=times), iter(verdicts), []

        def score(self: GRPOTrainer, examples: list[Example], batch: Batch, sampled: Completions) -> Rollout:
            asked.append([example.answer for example in examples])
            scores = torch.zeros(len(sampled.ids), 4)
            scores[:, 3] = torch.tensor([value for _ in examples for value in next(verdicts)])
            texts = decode(trainer.tokenizer, unpad(sampled.ids, sampled.mask))
            return Rollout(examples, batch, sampled, texts, scores, scores[:, 3] == 1)

        monkeypatch.setattr(GRPOTrainer, "score", score)
        metrics, rollout = trainer.step(0, EXAMPLES, lambda attempt: others[3 * attempt - 3 : 3 * attempt])
        assert metrics["logp_gap"] < 1e-4  # every row still belongs to its prompt
        assert texts_of(trainer, rollout) == rollout.texts
        prompts = encode_prompts(trainer.tokenizer, [example.question for example in rollout.examples])
        padded = (rollout.batch.prompt_ids, rollout.batch.prompt_mask)
        assert [ids[mask].tolist() for ids, mask in zip(*padded, strict=True)] == prompts
        return rollout, asked

    def test_groups_of_right_and_wrong_answers_stay_and_others_make_room(self, monkeypatch):
        rollout, asked = self.step(
            monkeypatch, [self.RIGHT, self.MIXED, self.WRONG, self.WRONG, self.MIXED, self.MIXED]
        )
        assert asked == [["3", "4", "15"], ["20", "21"], ["23"]]
        assert [example.answer for example in rollout.examples] == ["21", "4", "23"]
        assert rollout.scores[:, 3].tolist() == [*self.MIXED] * 3

    def test_it_ends_after_so_many_attempts_with_the_groups_there_are(self, monkeypatch):
        rollout, asked = self.step(monkeypatch, [self.WRONG, self.RIGHT, self.MIXED, *[self.RIGHT] * 4], times=2)
        assert asked == [["3", "4", "15"], ["20", "21"], ["23", "24"]]
        assert [example.answer for example in rollout.examples] == ["3", "4", "15"]

    def test_what_was_asked_before_is_not_asked_again(self, monkeypatch):
        others = [EXAMPLES[1], *self.OTHERS[:2], *EXAMPLES, self.OTHERS[1], self.OTHERS[0], self.OTHERS[2]]
        verdicts = [self.RIGHT, self.MIXED, self.WRONG, self.WRONG, self.WRONG, self.MIXED]
        rollout, asked = self.step(monkeypatch, verdicts, others=others)
        assert asked == [["3", "4", "15"], ["20", "21"], ["22"]]  # the second attempt drew known problems alone
        assert [example.answer for example in rollout.examples] == ["22", "4", "15"]

    def test_where_every_group_is_mixed_nothing_more_is_sampled(self, monkeypatch):
        _, asked = self.step(monkeypatch, [self.MIXED] * 3)
        assert asked == [["3", "4", "15"]]


class TestShapedRewards:
    """Whom reasoning and output consistency are paid to; a group with one right answer, one with none, one with all."""

    SCORES = torch.tensor([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [0.0] * 4] + [[1.0, 0.5, 1.0, 0.0]] * 3)

    @pytest.mark.parametrize(
        ("shaped_rewards", "expected"),
        [
            ("always", [3.0, 0.8, 0.0, *[1.05] * 3]),
            ("solved", [3.0, 0.8, 0.0, *[0.3] * 3]),
            ("right", [3.0, 0.3, 0.0, *[0.3] * 3]),
        ],
    )
    def test_the_reward_is_the_weighted_sum_of_the_scores_that_count(self, shaped_rewards: str, expected: list[float]):
        trainer = make_trainer(shaped_rewards=shaped_rewards, reward_weights=[0.3, 0.5, 0.5, 2.0])
        scores = torch.cat([self.SCORES, torch.ones(3, 4)])
        rollout = replace(make_rollout(trainer), scores=scores, right=scores[:, 3] == 1)
        assert trainer.total_rewards(rollout).tolist() == pytest.approx([*expected, *[3.3] * 3])

    def test_a_function_of_the_user_s_counts_always_whatever_its_name(self):
        def reasoning(completion: str) -> float:
            return 1.0

        trainer = make_trainer(shaped_rewards="right")
        trainer.rewards = RewardSet([Reward("reasoning", 0.5, reasoning)])
        rollout = replace(make_rollout(trainer), scores=torch.ones(9, 1), right=torch.zeros(9, dtype=torch.bool))
        assert trainer.total_rewards(rollout).tolist() == [0.5] * 9


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
        parts = ("sampling", "scoring", "reference", "learning", "optimizer", "waiting")
        seconds = [metrics[f"seconds/{part}"] for part in parts]
        assert sum(seconds) == pytest.approx(metrics["seconds"])
        assert [part for part, taken in zip(parts, seconds, strict=True) if not taken] == ["reference", "waiting"]

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
        scored = given.scores.cuda(), given.right.cuda()
        same = Rollout(given.examples, Batch(*batch), Completions(*sampled), given.texts, *scored)
        metrics = [learn(trainer, rollout, 1e-3) for trainer, rollout in ((here, given), (there, same))]
        for name in ("loss", "kl", "grad_norm", "clip_fraction"):
            assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-2, abs=1e-5), name
    here.model.load_state_dict({name: value.cpu() for name, value in there.model.state_dict().items()})
    assert torch.equal(make_rollout(there).sampled.ids.cpu(), make_rollout(here).sampled.ids)
