"""What the learner does when a loss or gradient is not finite, and when memory runs out."""

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import src.engine.learner
import src.grpo
from src.errors import UserError
from src.grpo import GRPOTrainer, Rollout
from tests.helpers import assert_same, gradients
from tests.test_grpo import PlainGRPO, assert_unchanged, learn, make_rollout, make_trainer, watch_updates, weights_of


class TestSkippedSteps:
    DULL = [0.1 + 0.2] * 3 + [1.0] * 3 + [0.0] * 3

    def check_skipped(self, trainer: GRPOTrainer, rollout: Rollout) -> None:
        before = weights_of(trainer)
        for count in (1, 2):
            metrics = learn(trainer, rollout, 1e-2)
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
        assert learn(trainer, rollout, 1e-2)["skipped_steps"] == 0
        assert_same(seen[0], expected)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_gradient_that_is_not_finite_skips_the_step(self, bad: float):
        trainer = make_trainer()
        rollout = make_rollout(trainer)
        learn(trainer, rollout, 1e-2)
        before, state = weights_of(trainer), {n: t.clone() for n, t in trainer.optimizer.state_tensors().items()}
        hook = next(trainer.model.parameters()).register_hook(lambda grad: grad * bad)
        assert learn(trainer, rollout, 1e-2)["skipped_steps"] == 1
        assert_unchanged(trainer, before)
        assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.optimizer.state_tensors().items())
        hook.remove()
        assert learn(trainer, rollout, 1e-2)["skipped_steps"] == 1
        assert trainer.skips_in_a_row == 0
        assert not torch.equal(weights_of(trainer)["lm_head.weight"], before["lm_head.weight"])

    def test_too_many_in_a_row_end_the_run_with_the_weights_as_they_were(self):
        trainer = make_trainer()
        rollout, before = make_rollout(trainer), weights_of(trainer)
        next(trainer.model.parameters()).register_hook(lambda grad: grad * math.nan)
        for _ in range(src.engine.learner.MAX_SKIPS - 1):
            learn(trainer, rollout, 1e-2)
        with pytest.raises(
            UserError, match=f"not finite in {src.engine.learner.MAX_SKIPS} updates in a row.*--learning_rate"
        ):
            learn(trainer, rollout, 1e-2)
        assert_unchanged(trainer, before)


class TestMemory:
    """What happens when the memory is full, played with an error that is raised on purpose."""

    FULL = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    )

    def fail(self, monkeypatch: pytest.MonkeyPatch, name: str, times: int, error: Exception = FULL[0]) -> list[int]:
        """Let a pass do its work, then run out of memory, so often; returns the budgets it was given."""
        work, budgets = getattr(src.grpo, name), []

        def failing(*args: Any, **kwargs: Any) -> Tensor:
            budgets.append(kwargs.get("token_budget", args[-1]))
            result = work(*args, **kwargs)
            if len(budgets) <= times:
                raise error
            return result

        monkeypatch.setattr(src.grpo, name, failing)
        return budgets

    @pytest.mark.parametrize("error", FULL)
    @pytest.mark.parametrize("name", ["accumulate_gradients", "batch_logps"])
    def test_a_full_memory_halves_the_micro_batches_and_changes_nothing_else(self, name, error, monkeypatch, caplog):
        settings = {"kl_coef": 0.3, "token_budget": 512}
        unharmed = make_trainer(**settings)
        expected = watch_updates(unharmed)
        metrics = learn(unharmed, make_rollout(unharmed), 1e-2)
        trainer = make_trainer(**settings)
        rollout, seen = make_rollout(trainer), watch_updates(trainer)
        budgets = self.fail(monkeypatch, name, 2, error)
        with caplog.at_level(logging.WARNING, "src.engine.learner"):
            again = learn(trainer, rollout, 1e-2)
        assert budgets == [512, 256, 128] and trainer.token_budget == 128
        assert [record.getMessage().split()[-2] for record in caplog.records] == ["256", "128"]
        assert_same(seen[0], expected[0])
        assert again["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
        learn(trainer, rollout, 1e-2)
        assert budgets[3:] == [128]  # for good

    def test_another_error_is_no_full_memory(self, monkeypatch):
        trainer = make_trainer(token_budget=256)
        rollout = make_rollout(trainer)
        budgets = self.fail(monkeypatch, "accumulate_gradients", 1, RuntimeError("CUDA error: illegal memory access"))
        with pytest.raises(RuntimeError, match="illegal memory access"):
            learn(trainer, rollout, 1e-2)
        assert budgets == [256]

    def test_a_memory_too_small_for_the_smallest_micro_batch_ends_the_run(self, monkeypatch):
        trainer = make_trainer(token_budget=256)
        rollout, before = make_rollout(trainer), weights_of(trainer)
        budgets = self.fail(monkeypatch, "accumulate_gradients", times=100)
        with pytest.raises(UserError, match=r"memory is full.*--group_size") as caught:
            learn(trainer, rollout, 1e-2)
        assert budgets == [256, 128, 64] and "\n" not in str(caught.value)
        assert_unchanged(trainer, before)
