"""The trainer against a plain loop over texts, and what it does when there is nothing, or nothing finite, to learn."""

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import src.engine.learner
import src.grpo
from src.data import Example
from src.engine.kv_cache import left_pad
from src.engine.logprobs import Batch
from src.engine.sampling import Completions, Sampler
from src.grpo import GRPOConfig, GRPOTrainer
from src.rollout import Rollout
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
    given |= {
        "kl_coef": 0.0,
        "loss_type": "grpo",
        "scale_advantages": True,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "reward_weights": [0.0, 0.0, 0.0, 1.0],
    }
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
    scores = torch.zeros(len(totals), 4, device=trainer.device)
    scores[:, 3] = torch.tensor(totals)
    prompt_ids, prompt_mask = left_pad(PROMPTS, 0, trainer.device)
    batch = Batch(prompt_ids, prompt_mask, sampled.ids, sampled.mask)
    return Rollout(EXAMPLES, batch, sampled, [""] * len(totals), scores, scores[:, 3] > 0)


def with_rows(rollout: Rollout, order: list[int]) -> Rollout:
    """The same rollout with its rows in another order."""
    s = rollout.sampled
    sampled = Completions(s.ids[order], s.mask[order], s.logps[order], s.truncated[order])
    batch = replace(rollout.batch, completion_ids=sampled.ids, completion_mask=sampled.mask)
    return replace(rollout, batch=batch, sampled=sampled, scores=rollout.scores[order], right=rollout.right[order])


def learn(trainer: GRPOTrainer, rollout: Rollout, lr: float) -> dict[str, float]:
    """The metrics of a step at this learning rate whose completions and scores are given."""
    trainer.config = replace(trainer.config, learning_rate=lr, warmup_steps=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "sample", lambda *_: (rollout.batch, rollout.sampled))
        patch.setattr(trainer, "score", lambda *_: rollout)
        return trainer.step(0, rollout.examples)[0]


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
        metrics = learn(trainer, rollout, 1e-2)
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
        metrics = learn(trainer, rollout, 0.01)
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
            metrics = learn(trainer, make_rollout(trainer), 1e-2)
            results.append((seen[0], metrics["loss"], metrics["kl"]))
        assert_same(results[1][0], results[0][0])
        assert results[1][1:] == pytest.approx(results[0][1:], abs=1e-5)

    def test_the_order_of_a_group_s_rows_does_not_matter(self):
        results = []
        for order in (list(range(9)), [2, 0, 1, 4, 5, 3, 8, 7, 6]):
            trainer = make_trainer(kl_coef=0.3)
            seen = watch_updates(trainer)
            metrics = learn(trainer, with_rows(make_rollout(trainer), order), 1e-2)
            results.append((seen[0], metrics["loss"]))
        assert_same(results[1][0], results[0][0])
        assert results[1][1] == pytest.approx(results[0][1], abs=1e-5)

    def test_the_advantages_are_those_of_the_weighted_rewards(self):
        scores = torch.rand(9, 4, generator=torch.Generator().manual_seed(3))
        seen = []
        for weights in ([0.3, 0.5, 0.5, 2.0], [0.0, 0.0, 0.0, 1.0]):
            trainer = make_trainer(reward_weights=weights)
            rollout = make_rollout(trainer, (scores @ torch.tensor([0.3, 0.5, 0.5, 2.0])).tolist())
            if weights[0]:
                rollout = replace(rollout, scores=scores)
            seen.append(watch_updates(trainer))
            learn(trainer, rollout, 1e-2)
        assert_same(seen[0][0], seen[1][0])

    def test_a_step_goes_the_way_of_the_advantages(self):
        trainer = make_trainer(learning_rate=1e-3)
        rollout = make_rollout(trainer)

        def logps() -> Tensor:
            rows = [ids[mask].tolist() for ids, mask in zip(rollout.sampled.ids, rollout.sampled.mask, strict=True)]
            with torch.no_grad():
                return torch.stack([plain_logps(trainer.model, PROMPTS[b // 3], r).mean() for b, r in enumerate(rows)])

        before = logps()
        learn(trainer, rollout, 1e-3)
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
        learn(trainer, rollout, 1e-2)
        assert len(shapes) == 2  # the prompts, and the completions
        [(logps, old_logps, ref_logps, *_)] = given
        assert torch.equal(logps, old_logps) and not old_logps.requires_grad and ref_logps is None

    def test_without_a_kl_term_there_is_no_reference(self):
        assert make_trainer(kl_coef=0.0).reference is None

    def test_with_a_kl_term_the_reference_runs_once_a_rollout_and_stays_as_it_was(self):
        trainer = make_trainer(kl_coef=0.3, updates_per_rollout=3)
        start = {name: param.detach() for name, param in tiny_model("qwen2").named_parameters()}
        rollout, shapes = make_rollout(trainer), count_calls(trainer.model)
        learn(trainer, rollout, 1e-2)
        assert len(shapes) == 2 + 3 * 2  # the prompts and the completions: the reference, and three updates
        assert_same(trainer.reference, start, tolerance=0)
        assert not any(tensor.requires_grad for tensor in trainer.reference.values())

    def test_the_policy_keeps_its_weights_and_their_addresses_whatever_the_reference_pass_ends_in(self, monkeypatch):
        trainer = make_trainer(kl_coef=0.3)
        rollout, before = make_rollout(trainer), weights_of(trainer)
        addresses = [param.data_ptr() for param in trainer.model.parameters()]
        monkeypatch.setattr(src.grpo, "batch_logps", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn(trainer, rollout, 1e-2)
        assert_unchanged(trainer, before)
        assert addresses == [param.data_ptr() for param in trainer.model.parameters()]

    def test_groups_without_signal_are_left_out_when_there_is_no_kl_term(self):
        for kl_coef, rows in ((0.0, 6), (0.3, 9)):
            trainer = make_trainer(kl_coef=kl_coef)
            rollout, shapes = make_rollout(trainer, TOTALS_WITH_A_DULL_GROUP), count_calls(trainer.model)
            learn(trainer, rollout, 1e-2)
            assert [shape[0] for shape in shapes[-2:]] == [rows // GROUP, rows]  # the last two passes are the learner's
