"""What a step sampled and what that earned: kept together, described for the logs, counted for the metrics.

Q problems, G completions each, B = Q * G rows, R reward functions, C completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.data import Example
from src.engine.kv_cache import left_pad, unpad
from src.engine.logprobs import Batch
from src.engine.sampling import Completions
from src.rewards import has_calculation


@dataclass(frozen=True)
class Rollout:
    """One step's problems, their completions group by group, and what these earned."""

    examples: Sequence[Example]  # Q
    batch: Batch
    sampled: Completions
    texts: list[str]  # B
    scores: Tensor  # (B, R), each reward function's own number
    right: Tensor  # (B,) bool

    def mixed_groups(self) -> Tensor:
        """Which groups have right answers and wrong ones: (Q,) bool."""
        return has_signal(self.right, self.batch.group_size)

    def describe(self, rewards: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
        """The first problem's group, completion by completion, for samples.jsonl; `rewards` (B,)."""
        return [
            {
                "question": self.examples[0].question,
                "answer": self.examples[0].answer,
                "completion": self.texts[row],
                "reward": float(rewards[row]),
                "rewards": dict(zip(names, self.scores[row].tolist(), strict=True)),
                "correct": bool(self.right[row]),
                "truncated": bool(self.sampled.truncated[row]),
            }
            for row in range(self.batch.group_size)
        ]

    def metrics(self, rewards: Tensor, advantages: Tensor, names: Sequence[str]) -> dict[str, float]:
        """What was sampled, what it earned, and what the totals hide; docs/metrics.md explains each."""
        lengths, gains = self.sampled.mask.sum(-1).float(), advantages.clamp(min=0)
        shown = [has_calculation(text) for text in self.texts]
        return {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            **{f"reward/{name}": mean for name, mean in zip(names, self.scores.mean(0).tolist(), strict=True)},
            "accuracy": float(self.right.float().mean()),
            "zero_signal_groups": float((~has_signal(rewards, self.batch.group_size)).float().mean()),
            "wrong_advantage": float((gains * ~self.right).sum() / gains.sum().clamp(min=1e-9)),
            "no_calculation": 1 - sum(shown) / len(shown),
            "entropy": -masked_mean(self.sampled.logps, self.sampled.mask),
            "completion_tokens": float(lengths.mean()),
            "completion_tokens_max": float(lengths.max()),
            "truncated": float(self.sampled.truncated.float().mean()),
        }


def has_signal(values: Tensor, group_size: int) -> Tensor:
    """Which groups have values that differ: (B,) -> (Q,) bool. Where rewards do not, only a KL term has a gradient."""
    groups = values.view(-1, group_size)
    return groups.amax(-1) > groups.amin(-1)


def pick_groups(rollouts: Sequence[Rollout], groups: Sequence[tuple[int, int]]) -> Rollout:
    """One rollout of these groups, in this order; each is named by its rollout and its place there."""
    size = rollouts[0].batch.group_size
    prompts = [unpad(rollout.batch.prompt_ids, rollout.batch.prompt_mask) for rollout in rollouts]

    def rows(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([values[r][q * size : (q + 1) * size] for r, q in groups])

    names = ("ids", "mask", "logps", "truncated")
    sampled = Completions(**{name: rows([getattr(r.sampled, name) for r in rollouts]) for name in names})
    padded = left_pad([prompts[r][q] for r, q in groups], 0, sampled.ids.device)
    return Rollout(
        examples=[rollouts[r].examples[q] for r, q in groups],
        batch=Batch(*padded, sampled.ids, sampled.mask),
        sampled=sampled,
        texts=[text for r, q in groups for text in rollouts[r].texts[q * size : (q + 1) * size]],
        scores=rows([rollout.scores for rollout in rollouts]),
        right=rows([rollout.right for rollout in rollouts]),
    )


def replace_unmixed(rollout: Rollout, other: Rollout) -> Rollout:
    """`rollout` with its groups that are all right or all wrong replaced by mixed ones of `other`, while they last."""
    groups = [(0, q) for q in range(len(rollout.examples))]
    places, chosen = ((~rollout.mixed_groups()).nonzero()[:, 0], other.mixed_groups().nonzero()[:, 0])
    for place, q in zip(places.tolist(), chosen.tolist(), strict=False):
        groups[place] = (1, q)
    return pick_groups([rollout, other], groups)


def clip_fraction(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip_eps: float, clip_eps_high: float | None
) -> float:
    """The share of the tokens in `mask` whose gradient the clip has cut off; (B, C), and advantages (B,)."""
    ratio = (logps - old_logps).exp()
    high = clip_eps if clip_eps_high is None else clip_eps_high
    too_high = (advantages[:, None] > 0) & (ratio > 1 + high)
    too_low = (advantages[:, None] < 0) & (ratio < 1 - clip_eps)
    return masked_mean((too_high | too_low).float(), mask)


def masked_mean(values: Tensor, mask: Tensor) -> float:
    """The mean of `values` where `mask`, both (B, C); 0 where there is nothing."""
    return float((values * mask).sum() / mask.sum().clamp(min=1))
