"""The trainer against a plain loop over texts, and what it does when there is nothing, or nothing finite, to learn."""

import copy
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import src.grpo
import src.learner
from src.data import Example, encode_prompts
from src.errors import UserError
from src.grpo import GRPOConfig, GRPOTrainer, Rollout
from src.kv_cache import left_pad
from src.policy import Batch
from src.reward_set import RewardSet, built_in
from src.sampling import Completions, Sampler, decode
from tests.helpers import assert_same, gradients, plain_logps, random_texts, tiny_model, word_tokenizer

END_IDS = [1, 5, 13, 34, 55]
PROMPTS = random_texts((5, 9, 3), 1)
GROUP, LONGEST = 3, 8
TOTALS = [1.0, 0.2, 3.3, 0.5, 0.0, 0.5, 2.0, 0.1, 0.1]
TOTALS_WITH_A_DULL_GROUP = [1.0, 0.2, 3.3, 0.3, 0.3, 0.3, 2.0, 0.1, 0.1]
EXAMPLES = [Example(f"Tom has {n} apples. How many?", "", "", str(n)) for n in (3, 4, 15)]


def make_trainer(model: PreTrainedModel | None = None, seed: int = 0, **settings: Any) -> GRPOTrainer:
    """A trainer whose reward is the last of the four alone; its policy is no longer where the reference is."""
    model = model or tiny_model("qwen2")
    given = {"prompts_per_step": 3, "group_size": GROUP, "max_completion_tokens": LONGEST, "temperature": 0.7}
    given |= {"kl_coef": 0.0, "warmup_steps": 0, "learning_rate": 1e-2, "reward_weights": [0.0, 0.0, 0.0, 1.0]}
    trainer = GRPOTrainer(model, word_tokenizer(), Sampler(model, END_IDS, 0), GRPOConfig(**given | settings), seed)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn(param.shape, generator=random).to(param))
    return trainer


def make_rollout(trainer: GRPOTrainer, totals: Sequence[float] = TOTALS) -> Rollout:
    """What the trainer's policy samples for PROMPTS, with these rewards."""
    uniforms = torch.rand(len(totals), LONGEST, generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": LONGEST, "temperature": trainer.config.temperature, "uniforms": uniforms}
    sampled = trainer.sampler.generate(PROMPTS, group_size=GROUP, **settings)
    rewards = torch.zeros(len(totals), 4, device=trainer.device)
    rewards[:, 3] = torch.tensor(totals)
    prompt_ids, prompt_mask = left_pad(PROMPTS, 0, trainer.device)
    return Rollout(Batch(prompt_ids, prompt_mask, sampled.ids, sampled.mask), sampled, [""] * len(totals), rewards)


def with_rows(rollout: Rollout, order: list[int]) -> Rollout:
    """The same rollout with its rows in another order."""
    s = rollout.sampled
    sampled = Completions(s.ids[order], s.mask[order], s.logps[order], s.truncated[order])
    batch = replace(rollout.batch, completion_ids=sampled.ids, completion_mask=sampled.mask)
    return Rollout(batch, sampled, rollout.texts, rollout.rewards[order])


def watch_updates(trainer: GRPOTrainer) -> list[dict[str, Tensor]]:
    """The gradients that reach the optimizer, update by update."""
    seen, step = [], trainer.optimizer.step

    def watching(lr: float, max_grad_norm: float) -> float | None:
        seen.append(gradients(trainer.model))
        return step(lr, max_grad_norm)

    trainer.optimizer.step = watching
    return seen


def weights_of(trainer: GRPOTrainer) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters()}


def assert_unchanged(trainer: GRPOTrainer, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(param, before[name]) for name, param in trainer.model.named_parameters())


def count_calls(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """The shape of the input of every pass through the model from now on."""
    shapes: list[tuple[int, ...]] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def plain_advantages(totals: Sequence[float], scale: bool) -> list[float]:
    out = []
    for start in range(0, len(totals), GROUP):
        group = totals[start : start + GROUP]
        spread = statistics.stdev(group) + 1e-4 if scale else 1.0
        out += [(total - statistics.mean(group)) / spread if len(set(group)) > 1 else 0.0 for total in group]
    return out


def reference_of(trainer: GRPOTrainer) -> PreTrainedModel | None:
    """A model of its own with the reference's weights."""
    if trainer.reference is None:
        return None
    model = copy.deepcopy(trainer.model)
    model.load_state_dict(trainer.reference, strict=False)
    return model


class PlainGRPO:
    """GRPO as the papers write it: one completion at a time, no padding, no cache, no micro-batches."""

    def __init__(self, trainer: GRPOTrainer, rollout: Rollout, totals: Sequence[float]):
        self.model, self.reference, self.config = trainer.model, reference_of(trainer), trainer.config
        self.prompts = [PROMPTS[b // GROUP] for b in range(len(totals))]
        self.texts = [ids[mask].tolist() for ids, mask in zip(rollout.sampled.ids, rollout.sampled.mask, strict=True)]
        self.kept = [not (self.config.mask_truncated and cut) for cut in rollout.sampled.truncated.tolist()]
        self.advantages = plain_advantages(totals, self.config.scale_advantages)
        self.old: list[Tensor] | None = None
        self.divergences: list[float] = []  # of the tokens trained on

    def backward(self) -> float:
        """Put the gradient of the next update into the model; returns the loss."""
        c = self.config
        logps = [plain_logps(self.model, *pair, c.temperature) for pair in zip(self.prompts, self.texts, strict=True)]
        if self.old is None:
            self.old = [row.detach() for row in logps]
        tokens = [self.token_losses(b, row) for b, row in enumerate(logps)]
        rows, total = len(tokens), sum(len(row) for b, row in enumerate(tokens) if self.kept[b])
        kept = [row for b, row in enumerate(tokens) if self.kept[b]]
        if c.loss_type == "grpo":
            loss = sum(row.mean() for row in kept) / rows
        elif c.loss_type == "dapo":
            loss = sum(row.sum() for row in kept) / total
        else:
            loss = sum(row.sum() for row in kept) / (rows * LONGEST)
        self.model.zero_grad()
        loss.backward()
        return float(loss.detach())

    def token_losses(self, b: int, logps: Tensor) -> Tensor:
        c, advantage = self.config, self.advantages[b]
        ratio = (logps - self.old[b]).exp()
        high = 1 + (c.clip_eps if c.clip_eps_high is None else c.clip_eps_high)
        loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - c.clip_eps, high) * advantage)
        if c.kl_coef:
            with torch.no_grad():
                ref = plain_logps(self.reference, self.prompts[b], self.texts[b], c.temperature)
            divergence = (ref - logps).exp() - (ref - logps) - 1
            self.divergences += divergence.tolist() if self.kept[b] else []
            loss = loss + c.kl_coef * divergence
        return loss


def norm_of(grads: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))


VARIANTS = [
    {"loss_type": "grpo"},
    {"loss_type": "dapo", "kl_coef": 0.3},
    {"loss_type": "dr_grpo", "scale_advantages": False},
    {"loss_type": "grpo", "kl_coef": 0.3, "mask_truncated": True},
    {"loss_type": "dapo", "mask_truncated": True, "temperature": 1.3},
    {"loss_type": "dr_grpo", "kl_coef": 0.3, "mask_truncated": True, "temperature": 1.0},
    {"loss_type": "grpo", "kl_coef": 0.3, "temperature": 1.3},
]


class TestGradient:
    @pytest.mark.parametrize("totals", [TOTALS, TOTALS_WITH_A_DULL_GROUP])
    @pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: "-".join(map(str, settings.values())))
    def test_an_update_has_the_gradient_of_the_plain_loop(self, settings: dict[str, Any], totals: list[float]):
        trainer = make_trainer(**settings)
        rollout = make_rollout(trainer, totals)
        assert 0 < rollout.sampled.truncated.sum() < len(totals)
        plain = PlainGRPO(trainer, rollout, totals)
        loss = plain.backward()
        expected = gradients(trainer.model)
        trainer.model.zero_grad()
        seen = watch_updates(trainer)
        metrics = trainer.learn(rollout, lr=1e-2)
        assert_same(seen[0], expected)
        assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm_of(expected), rel=1e-4)
        assert metrics["kl"] == pytest.approx(statistics.mean(plain.divergences or [0.0]), abs=1e-5)
        assert metrics["logp_gap"] < 1e-4  # the learner scores what was sampled as the sampler did
        assert metrics["clip_fraction"] == 0 == metrics["skipped_steps"]

    @pytest.mark.parametrize("settings", [{}, {"kl_coef": 0.3, "clip_eps_high": 0.28, "loss_type": "dapo"}])
    def test_several_updates_clip_against_the_first_one_s_log_probabilities(self, settings: dict[str, Any]):
        trainer = make_trainer(updates_per_rollout=3, max_grad_norm=0.5, learning_rate=0.01, **settings)
        twin = make_trainer(updates_per_rollout=3, max_grad_norm=0.5, learning_rate=0.01, **settings)
        rollout = make_rollout(trainer)
        plain, expected = PlainGRPO(twin, rollout, TOTALS), []
        adam = torch.optim.AdamW(twin.model.parameters(), lr=0.01, weight_decay=0.0)
        for _ in range(3):
            plain.backward()
            expected.append(gradients(twin.model))
            torch.nn.utils.clip_grad_norm_(twin.model.parameters(), 0.5)
            adam.step()
        seen = watch_updates(trainer)
        metrics = trainer.learn(rollout, lr=0.01)
        assert len(seen) == 3
        for actual, plain_grads in zip(seen, expected, strict=True):
            assert_same(actual, plain_grads, tolerance=1e-3)
        assert metrics["clip_fraction"] > 0  # else the old log-probabilities would not matter
        assert metrics["grad_norm"] == pytest.approx(norm_of(expected[0]), rel=1e-4)

    @pytest.mark.parametrize("kl_coef", [0.0, 0.3])
    @pytest.mark.parametrize("token_budget", [1, 7, 20])
    def test_any_token_budget_has_the_same_gradient(self, token_budget: int, kl_coef: float):
        results = []
        for budget in (10**6, token_budget):
            trainer = make_trainer(token_budget=budget, kl_coef=kl_coef)
            seen = watch_updates(trainer)
            metrics = trainer.learn(make_rollout(trainer), lr=1e-2)
            results.append((seen[0], metrics["loss"], metrics["kl"]))
        assert_same(results[1][0], results[0][0])
        assert results[1][1:] == pytest.approx(results[0][1:], abs=1e-5)

    def test_the_order_of_a_group_s_rows_does_not_matter(self):
        results = []
        for order in (list(range(9)), [2, 0, 1, 4, 5, 3, 8, 7, 6]):
            trainer = make_trainer(kl_coef=0.3)
            seen = watch_updates(trainer)
            metrics = trainer.learn(with_rows(make_rollout(trainer), order), lr=1e-2)
            results.append((seen[0], metrics["loss"]))
        assert_same(results[1][0], results[0][0])
        assert results[1][1] == pytest.approx(results[0][1], abs=1e-5)

    def test_the_advantages_are_those_of_the_weighted_rewards(self):
        rewards = torch.rand(9, 4, generator=torch.Generator().manual_seed(3))
        seen = []
        for weights in ([0.3, 0.5, 0.5, 2.0], [0.0, 0.0, 0.0, 1.0]):
            trainer = make_trainer(reward_weights=weights)
            rollout = make_rollout(trainer, (rewards @ torch.tensor([0.3, 0.5, 0.5, 2.0])).tolist())
            if weights[0]:
                rollout = replace(rollout, rewards=rewards)
            seen.append(watch_updates(trainer))
            trainer.learn(rollout, lr=1e-2)
        assert_same(seen[0][0], seen[1][0])

    def test_a_step_goes_the_way_of_the_advantages(self):
        trainer = make_trainer(learning_rate=1e-3)
        rollout = make_rollout(trainer)

        def logps() -> Tensor:
            rows = [ids[mask].tolist() for ids, mask in zip(rollout.sampled.ids, rollout.sampled.mask, strict=True)]
            with torch.no_grad():
                return torch.stack([plain_logps(trainer.model, PROMPTS[b // 3], r).mean() for b, r in enumerate(rows)])

        before = logps()
        trainer.learn(rollout, lr=1e-3)
        advantages = torch.tensor(plain_advantages(TOTALS, True))
        assert ((logps() - before) * advantages).mean() > 0


class TestPasses:
    def test_on_policy_the_ratio_is_exactly_one_and_there_is_no_pass_but_the_learner_s(self, monkeypatch):
        trainer = make_trainer()
        rollout, given, loss = make_rollout(trainer), [], src.grpo.grpo_loss
        monkeypatch.setattr(
            src.grpo, "grpo_loss", lambda *args, **settings: given.append(args) or loss(*args, **settings)
        )
        shapes = count_calls(trainer.model)
        trainer.learn(rollout, lr=1e-2)
        assert len(shapes) == 2  # the prompts, and the completions
        [(logps, old_logps, ref_logps, *_)] = given
        assert torch.equal(logps, old_logps) and not old_logps.requires_grad and ref_logps is None

    def test_without_a_kl_term_there_is_no_reference(self):
        assert make_trainer(kl_coef=0.0).reference is None

    def test_with_a_kl_term_the_reference_runs_once_a_rollout_and_stays_as_it_was(self):
        trainer = make_trainer(kl_coef=0.3, updates_per_rollout=3)
        start = {name: param.detach() for name, param in tiny_model("qwen2").named_parameters()}
        rollout, shapes = make_rollout(trainer), count_calls(trainer.model)
        trainer.learn(rollout, lr=1e-2)
        assert len(shapes) == 2 + 3 * 2  # the prompts and the completions: the reference, and three updates
        assert_same(trainer.reference, start, tolerance=0)
        assert not any(tensor.requires_grad for tensor in trainer.reference.values())

    def test_the_policy_keeps_its_weights_and_their_addresses_whatever_the_reference_pass_ends_in(self, monkeypatch):
        trainer = make_trainer(kl_coef=0.3)
        rollout, before = make_rollout(trainer), weights_of(trainer)
        addresses = [param.data_ptr() for param in trainer.model.parameters()]
        monkeypatch.setattr(src.grpo, "batch_logps", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.learn(rollout, lr=1e-2)
        assert_unchanged(trainer, before)
        assert addresses == [param.data_ptr() for param in trainer.model.parameters()]

    def test_groups_without_signal_are_left_out_when_there_is_no_kl_term(self):
        for kl_coef, rows in ((0.0, 6), (0.3, 9)):
            trainer = make_trainer(kl_coef=kl_coef)
            rollout, shapes = make_rollout(trainer, TOTALS_WITH_A_DULL_GROUP), count_calls(trainer.model)
            trainer.learn(rollout, lr=1e-2)
            assert [shape[0] for shape in shapes[-2:]] == [rows // GROUP, rows]  # the last two passes are the learner's


class TestSkippedSteps:
    DULL = [0.1 + 0.2] * 3 + [1.0] * 3 + [0.0] * 3

    def check_skipped(self, trainer: GRPOTrainer, rollout: Rollout) -> None:
        before = weights_of(trainer)
        for count in (1, 2):
            metrics = trainer.learn(rollout, lr=1e-2)
            assert all(math.isfinite(value) for value in metrics.values())
            assert metrics["skipped_steps"] == count and metrics["grad_norm"] == 0 == metrics["loss"]
        assert_unchanged(trainer, before)
        assert trainer.optimizer.adam.state == {}

    @pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
    @pytest.mark.parametrize("kl_coef", [0.0, 0.3])
    def test_only_truncated_completions_skip_the_step_when_they_are_masked(self, kl_coef: float, loss_type: str):
        trainer = make_trainer(mask_truncated=True, kl_coef=kl_coef, loss_type=loss_type)
        rollout = make_rollout(trainer)
        self.check_skipped(trainer, replace(rollout, sampled=replace(rollout.sampled, truncated=torch.ones(9) > 0)))

    def test_no_signal_skips_the_step(self):
        trainer = make_trainer()
        self.check_skipped(trainer, make_rollout(trainer, self.DULL))

    def test_no_signal_leaves_the_gradient_of_the_kl_term_alone(self):
        trainer = make_trainer(kl_coef=0.3)
        rollout = make_rollout(trainer, self.DULL)
        PlainGRPO(trainer, rollout, self.DULL).backward()
        expected = gradients(trainer.model)
        trainer.model.zero_grad()
        seen = watch_updates(trainer)
        assert trainer.learn(rollout, lr=1e-2)["skipped_steps"] == 0
        assert_same(seen[0], expected)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_gradient_that_is_not_finite_skips_the_step(self, bad: float):
        trainer = make_trainer()
        rollout = make_rollout(trainer)
        trainer.learn(rollout, lr=1e-2)
        before, state = weights_of(trainer), {n: t.clone() for n, t in trainer.optimizer.state_tensors().items()}
        hook = next(trainer.model.parameters()).register_hook(lambda grad: grad * bad)
        assert trainer.learn(rollout, lr=1e-2)["skipped_steps"] == 1
        assert_unchanged(trainer, before)
        assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.optimizer.state_tensors().items())
        hook.remove()
        assert trainer.learn(rollout, lr=1e-2)["skipped_steps"] == 1
        assert trainer.skips_in_a_row == 0
        assert not torch.equal(weights_of(trainer)["lm_head.weight"], before["lm_head.weight"])

    def test_too_many_in_a_row_end_the_run_with_the_weights_as_they_were(self):
        trainer = make_trainer()
        rollout, before = make_rollout(trainer), weights_of(trainer)
        next(trainer.model.parameters()).register_hook(lambda grad: grad * math.nan)
        for _ in range(src.learner.MAX_SKIPS - 1):
            trainer.learn(rollout, lr=1e-2)
        with pytest.raises(UserError, match=f"not finite in {src.learner.MAX_SKIPS} updates in a row.*--learning_rate"):
            trainer.learn(rollout, lr=1e-2)
        assert_unchanged(trainer, before)


class TestMemory:
    """What happens when the GPU's memory is full, played with an error that is raised on purpose."""

    def fail(self, monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> list[int]:
        """Let a pass do its work, then run out of memory, so often; returns the budgets it was given."""
        work, budgets = getattr(src.grpo, name), []

        def failing(*args: Any, **kwargs: Any) -> Tensor:
            budgets.append(kwargs.get("token_budget", args[-1]))
            result = work(*args, **kwargs)
            if len(budgets) <= times:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

        monkeypatch.setattr(src.grpo, name, failing)
        return budgets

    @pytest.mark.parametrize("name", ["accumulate_gradients", "batch_logps"])
    def test_a_full_memory_halves_the_micro_batches_and_changes_nothing_else(self, name, monkeypatch, caplog):
        settings = {"kl_coef": 0.3, "token_budget": 512}
        unharmed = make_trainer(**settings)
        expected = watch_updates(unharmed)
        metrics = unharmed.learn(make_rollout(unharmed), lr=1e-2)
        trainer = make_trainer(**settings)
        rollout, seen = make_rollout(trainer), watch_updates(trainer)
        budgets = self.fail(monkeypatch, name, times=2)
        with caplog.at_level(logging.WARNING, "src.learner"):
            again = trainer.learn(rollout, lr=1e-2)
        assert budgets == [512, 256, 128] and trainer.token_budget == 128
        assert [record.getMessage().split()[-2] for record in caplog.records] == ["256", "128"]
        assert_same(seen[0], expected[0])
        assert again["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
        trainer.learn(rollout, lr=1e-2)
        assert budgets[3:] == [128]  # for good

    def test_a_memory_too_small_for_the_smallest_micro_batch_ends_the_run(self, monkeypatch):
        trainer = make_trainer(token_budget=256)
        rollout, before = make_rollout(trainer), weights_of(trainer)
        budgets = self.fail(monkeypatch, "accumulate_gradients", times=100)
        with pytest.raises(UserError, match=r"memory is full.*--group_size") as caught:
            trainer.learn(rollout, lr=1e-2)
        assert budgets == [256, 128, 64] and "\n" not in str(caught.value)
        assert_unchanged(trainer, before)


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
