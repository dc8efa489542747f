"""The trainer: samples groups, scores them, and updates the policy (the formulas are in `src/objective.py`).

Q prompts a step, G completions each, B = Q * G rows, R reward functions, C completion tokens.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.data import SYSTEM_PROMPT, Example, encode_prompts
from src.engine.kv_cache import left_pad
from src.engine.learner import Learner
from src.engine.logprobs import Batch, accumulate_gradients, batch_logps
from src.engine.sampling import Completions, Sampler, decode
from src.errors import UserError
from src.objective import (
    clip_fraction,
    group_advantages,
    grpo_loss,
    has_signal,
    kl_estimate,
    masked_mean,
    token_weights,
)
from src.reward_set import RewardSet, built_in, token_ids
from src.rewards import DEFAULT_WEIGHTS, REWARD_FUNCTIONS, answer_accuracy
from src.seeding import generator
from src.settings import check_fields, flag

PARTS = ("sampling", "scoring", "reference", "learning", "optimizer")  # of a step, each timed


@dataclass
class GRPOConfig:
    """Settings of the algorithm; each is a flag of train.py."""

    prompts_per_step: int = flag(8, "problems a step, Q", least=1)
    group_size: int = flag(8, "completions a problem, G", least=2)
    max_prompt_tokens: int = flag(320, "problems with a longer prompt are left out", least=2)
    max_completion_tokens: int = flag(300, "a completion is cut off here", least=1)
    temperature: float = flag(1.0, "of sampling, and of every log-probability", above=0)
    learning_rate: float = flag(1e-6, "of AdamW, after the warm-up", above=0)
    warmup_steps: int = flag(10, "steps over which the learning rate rises to its value", least=0)
    max_grad_norm: float = flag(1.0, "a longer gradient is scaled down to this norm", above=0)
    kl_coef: float = flag(0.04, "weight of the KL term that holds the policy near the reference; 0: none", least=0)
    clip_eps: float = flag(0.2, "the probability ratio is clipped to 1 - this and 1 + this", above=0, below=1)
    clip_eps_high: float | None = flag(None, "the upper bound is 1 + this instead (DAPO: 0.28)", above=0)
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = flag(
        "grpo", "average over tokens: per completion (grpo), over the step (dapo), over the longest length (dr_grpo)"
    )
    scale_advantages: bool = flag(True, "divide by the group's standard deviation (false: Dr. GRPO)")
    updates_per_rollout: int = flag(1, "optimizer steps on each batch of completions", least=1)
    mask_truncated: bool = flag(False, "learn nothing from completions that were cut off (DAPO)")
    dynamic_sampling: int = flag(0, "times a group whose rewards are all equal is sampled anew (DAPO)", least=0)
    reward_weights: list[float] = flag(
        list(DEFAULT_WEIGHTS), "of formatting, reasoning, output consistency, answer accuracy"
    )
    rewards: str | None = flag(None, "other rewards: FILE.py:NAME=WEIGHT,... by name from the file or built in")
    token_budget: int = flag(
        4096, "completion tokens in one micro-batch; changes memory and speed, not the result", least=1, alters=False
    )

    def __post_init__(self) -> None:
        check_fields(self)
        names = [function.__name__ for function in REWARD_FUNCTIONS]
        if len(self.reward_weights) != len(names) or not all(math.isfinite(w) for w in self.reward_weights):
            raise UserError(f"--reward_weights is {self.reward_weights}: give {len(names)}, for {', '.join(names)}.")
        if self.rewards is not None and self.reward_weights != list(DEFAULT_WEIGHTS):
            raise UserError("--rewards has the weights of its rewards in it: leave --reward_weights out.")


@dataclass(frozen=True)
class Rollout:
    """One step's completions and what they earned."""

    batch: Batch
    sampled: Completions
    texts: list[str]  # B
    rewards: Tensor  # (B, R), each reward function's own number

    def totals(self, weights: Sequence[float]) -> Tensor:
        """The weighted sum of the rewards, (B,)."""
        return self.rewards @ self.rewards.new_tensor(weights)

    def describe(self, question: str, answer: str, rewards: RewardSet) -> list[dict[str, Any]]:
        """The first problem's group, completion by completion, for samples.jsonl."""
        totals = self.totals(rewards.weights).tolist()
        return [
            {
                "question": question,
                "answer": answer,
                "completion": self.texts[row],
                "reward": totals[row],
                "rewards": dict(zip(rewards.names, self.rewards[row].tolist(), strict=True)),
                "truncated": bool(self.sampled.truncated[row]),
                "correct": answer_accuracy(self.texts[row], answer) == 1,
            }
            for row in range(self.batch.group_size)
        ]


class GRPOTrainer(Learner):
    """Trains `model` in place. The reference is the model as it is now; without a KL term there is none.

    Only the trained weights of the reference are kept: with LoRA that is a copy of the adapter, not of the model.

    seed: of the sampling. rewards: the built-in ones, weighted as `config` says, when left out. system_prompt: before
    every question.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampler: Sampler,
        config: GRPOConfig,
        seed: int = 0,
        rewards: RewardSet | None = None,
        system_prompt: str = SYSTEM_PROMPT,
    ):
        self.rewards, self.system_prompt = rewards or built_in(config.reward_weights), system_prompt
        super().__init__(model, config.max_grad_norm, config.token_budget)
        self.tokenizer, self.sampler, self.config, self.seed = tokenizer, sampler, config, seed
        trained = self.optimizer.params.items()
        self.reference = {name: p.detach().clone() for name, p in trained} if config.kl_coef else None
        self._clip = {"clip_eps": config.clip_eps, "clip_eps_high": config.clip_eps_high}
        self.seconds: dict[str, float] = {}

    def step(self, step: int, examples: Sequence[Example]) -> tuple[dict[str, float], Rollout]:
        """One step (numbered from 0) on these problems: sample, score, learn. Returns its metrics and completions."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        rollout = self.roll_out(step, examples)
        metrics = self._rollout_metrics(rollout)
        metrics |= self.learn(rollout, self.learning_rate(step))
        total = sum(self.seconds.values())
        metrics |= {f"seconds/{name}": seconds for name, seconds in self.seconds.items()} | {"seconds": total}
        metrics["tokens_per_second"] = float(rollout.sampled.mask.sum()) / total
        return metrics, rollout

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant."""
        return self.config.learning_rate * min(1.0, (step + 1) / max(1, self.config.warmup_steps))

    def roll_out(self, step: int, examples: Sequence[Example]) -> Rollout:
        """Sample a group of completions for each problem and score them."""
        rollout = self._sample_and_score(step, 0, examples)
        for attempt in range(1, self.config.dynamic_sampling + 1):
            signal = has_signal(rollout.totals(self.rewards.weights), self.config.group_size)
            if signal.all():
                break
            dull = (~signal).nonzero()[:, 0].tolist()
            again = self._sample_and_score(step, attempt, [examples[q] for q in dull])
            rollout = _replace_groups(rollout, dull, again)
        return rollout

    def _sample_and_score(self, step: int, attempt: int, examples: Sequence[Example]) -> Rollout:
        c = self.config
        with self._timed("sampling"):
            prompts = encode_prompts(self.tokenizer, [e.question for e in examples], self.system_prompt)
            shape = (len(prompts) * c.group_size, c.max_completion_tokens)
            sampled = self.sampler.generate(
                prompts,
                group_size=c.group_size,
                max_new_tokens=c.max_completion_tokens,
                temperature=c.temperature,
                uniforms=torch.rand(shape, generator=generator(self.seed, "sampling", step, attempt)),
            )
            texts = decode(self.tokenizer, sampled)
        with self._timed("scoring"):
            problems = [example for example in examples for _ in range(c.group_size)]
            scores = self.rewards.score(texts, problems, token_ids(sampled.ids, sampled.mask))
            rewards = torch.tensor(scores, device=self.device)
        prompt_ids, prompt_mask = left_pad(prompts, self.sampler.pad_id, self.device)
        return Rollout(Batch(prompt_ids, prompt_mask, sampled.ids, sampled.mask), sampled, texts, rewards)

    def learn(self, rollout: Rollout, lr: float) -> dict[str, float]:
        """`updates_per_rollout` optimizer steps on one rollout. Returns the metrics of learning."""
        c, batch = self.config, rollout.batch
        advantages = group_advantages(rollout.totals(self.rewards.weights), c.group_size, c.scale_advantages)
        mask = batch.completion_mask
        if c.mask_truncated:
            mask = mask & ~rollout.sampled.truncated[:, None]
        weights = token_weights(mask, c.loss_type, c.max_completion_tokens)
        teaches = mask.any(-1)
        if self.reference is None:  # then a row without advantage has no gradient: it is left out, its weight is not
            teaches &= advantages != 0
        rows = teaches.nonzero()[:, 0]
        ref_logps = self._reference_logps(batch, rows)
        old_logps: Tensor | None = None
        grad_norm, losses, clipped = None, [], []
        for _ in range(c.updates_per_rollout):
            with self._timed("learning"):
                logps, loss = self._accumulate(batch, rows, advantages, weights, old_logps, ref_logps)
            # The first update is on the policy that sampled: its own log-probabilities are the old ones.
            first, old_logps = old_logps is None, logps if old_logps is None else old_logps
            losses.append(loss)
            clipped.append(clip_fraction(logps, old_logps, advantages, mask, **self._clip))
            with self._timed("optimizer"):
                norm = self._apply(lr, loss)
            grad_norm = norm if first else grad_norm
        taught = batch.completion_mask & teaches[:, None]
        kl = masked_mean(kl_estimate(old_logps, ref_logps), taught) if ref_logps is not None else 0.0
        return {
            "loss": losses[0],
            "kl": kl,
            "grad_norm": grad_norm if grad_norm is not None and math.isfinite(grad_norm) else 0.0,
            "lr": lr,
            "clip_fraction": sum(clipped) / len(clipped),
            "logp_gap": masked_mean((old_logps - rollout.sampled.logps).abs(), taught),
            "skipped_steps": float(self.skipped_steps),
        }

    def _reference_logps(self, batch: Batch, rows: Tensor) -> Tensor | None:
        if self.reference is None:
            return None
        with self._timed("reference"), self.reference_weights():
            return self._within_memory(
                lambda budget: batch_logps(self.model, batch, rows, self.config.temperature, budget)
            )

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Within, the model is the reference: the two change places without a copy, so addresses stay."""
        self._change_places()
        try:
            yield
        finally:
            self._change_places()

    def _change_places(self) -> None:
        for name, param in self.optimizer.params.items():
            param.data, self.reference[name] = self.reference[name], param.data

    def _accumulate(
        self,
        batch: Batch,
        rows: Tensor,
        advantages: Tensor,
        weights: Tensor,
        old_logps: Tensor | None,
        ref_logps: Tensor | None,
    ) -> tuple[Tensor, float]:
        """The gradient of one update, added up over micro-batches. Returns log-probs (B, C) and the loss."""
        c = self.config

        def loss(row: Tensor, column: Tensor, logps: Tensor) -> Tensor:
            old = logps.detach() if old_logps is None else old_logps[row, column]
            ref = None if ref_logps is None else ref_logps[row, column]
            return grpo_loss(logps, old, ref, advantages[row], weights[row, column], kl_coef=c.kl_coef, **self._clip)

        def accumulate(budget: int) -> tuple[Tensor, Tensor]:
            self.optimizer.zero_grad()
            return accumulate_gradients(self.model, batch, rows, loss, temperature=c.temperature, token_budget=budget)

        logps, total = self._within_memory(accumulate)
        return logps, float(total)

    def _rollout_metrics(self, rollout: Rollout) -> dict[str, float]:
        sampled, totals = rollout.sampled, rollout.totals(self.rewards.weights)
        lengths = sampled.mask.sum(-1).float()
        metrics = {"reward": float(totals.mean()), "reward_std": float(totals.std())}
        for name, values in zip(self.rewards.names, rollout.rewards.T, strict=True):
            metrics[f"reward/{name}"] = float(values.mean())
        return metrics | {
            "zero_signal_groups": float((~has_signal(totals, self.config.group_size)).float().mean()),
            "entropy": -masked_mean(sampled.logps, sampled.mask),
            "completion_tokens": float(lengths.mean()),
            "completion_tokens_max": float(lengths.max()),
            "truncated": float(sampled.truncated.float().mean()),
        }

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _replace_groups(rollout: Rollout, groups: list[int], new: Rollout) -> Rollout:
    """`rollout` with these groups' completions and rewards taken from `new`."""
    size = rollout.batch.group_size
    rows = torch.tensor([q * size + g for q in groups for g in range(size)], device=rollout.rewards.device)
    names = ("ids", "mask", "logps", "truncated")
    fields = {n: getattr(rollout.sampled, n).index_copy(0, rows, getattr(new.sampled, n)) for n in names}
    texts = list(rollout.texts)
    for row, text in zip(rows.tolist(), new.texts, strict=True):
        texts[row] = text
    batch = replace(rollout.batch, completion_ids=fields["ids"], completion_mask=fields["mask"])
    return Rollout(batch, Completions(**fields), texts, rollout.rewards.index_copy(0, rows, new.rewards))
