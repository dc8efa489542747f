"""The mathematics of GRPO as pure functions on tensors: advantages, token weights, KL and the loss.

Group relative policy optimisation: DeepSeekMath, arXiv:2402.03300, section 4. Q prompts a step, G completions each,
B = Q * G rows, C completion tokens.

| name | shape | what |
| --- | --- | --- |
| `rewards` | (B,) | the weighted sum of the reward functions |
| `advantages` | (B,) | the rewards, normalised within their group |
| `logps`, `old_logps`, `ref_logps` | (B, C) | of the sampled tokens: policy, policy that sampled, frozen reference |
| `weights` | (B, C) | each token's share in the loss; 0 where it is not trained on |
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_size: int, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """(reward - group mean) / (group standard deviation + eps), n - 1 in the deviation: (B,) -> (B,).

    DeepSeekMath, section 4.1.2. scale False leaves the division out (Dr. GRPO, arXiv:2503.20783). Equal rewards give
    exactly 0, whatever rounding would leave of them.
    """
    groups = rewards.view(-1, group_size)  # (Q, G)
    centred = groups - groups.mean(-1, keepdim=True)
    centred = torch.where(has_signal(rewards, group_size)[:, None], centred, 0.0)
    return (centred / (groups.std(-1, keepdim=True) + eps) if scale else centred).flatten()


def has_signal(rewards: Tensor, group_size: int) -> Tensor:
    """Which groups have rewards that differ: (B,) -> (Q,) bool. The others teach the policy nothing."""
    groups = rewards.view(-1, group_size)
    return groups.amax(-1) > groups.amin(-1)


def token_weights(mask: Tensor, loss_type: str, max_completion_tokens: int) -> Tensor:
    """The share of each token in the loss of the whole step, from the tokens trained on: (B, C) bool -> (B, C).

    grpo: the mean over rows of each row's mean (DeepSeekMath, eq. 3); dapo: the mean over all tokens
    (arXiv:2503.14476, eq. 8); dr_grpo: the sum over rows * max_completion_tokens (arXiv:2503.20783).
    """
    tokens = mask.float()
    if loss_type == "grpo":
        return tokens / tokens.sum(-1, keepdim=True).clamp(min=1) / len(mask)
    if loss_type == "dapo":
        return tokens / tokens.sum().clamp(min=1)
    return tokens / (len(mask) * max_completion_tokens)


def kl_estimate(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """k3 = exp(d) - d - 1, d = ref - policy: unbiased, never negative (Schulman 2020; DeepSeekMath, eq. 4)."""
    delta = ref_logps - logps
    return delta.exp() - delta - 1


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """The clipped policy loss plus `kl_coef` times KL, summed with `weights` (DeepSeekMath, eq. 3, negated).

    One entry a token, in any shape, `advantages` too (or one that broadcasts) -> scalar. The tokens may be any part of
    the step: the losses of the parts add up to that of the whole.
    """
    ratio = (logps - old_logps).exp()
    high = clip_eps if clip_eps_high is None else clip_eps_high
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + high) * advantages)
    loss = -gain
    if ref_logps is not None:
        loss = loss + kl_coef * kl_estimate(logps, ref_logps)
    return (loss * weights).sum()


def clip_fraction(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
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
