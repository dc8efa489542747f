"""GRPO: sample a group of answers to each problem, and make those that beat their group more likely.

Group relative policy optimisation, DeepSeekMath (arXiv:2402.03300, section 4): outcome rewards, one number a
completion, and the KL term of its equation 3. The clearest text on it here is `PlainGRPO` in tests/test_grpo.py, which
has neither padding nor cache nor micro-batches; `GRPOTrainer.step` gives its gradient.

With TRL 1.16's settings the loss and the gradient are TRL's. Where the defaults differ, ours and TRL's: kl_coef
0.001 / beta 0.0, the KL term without TRL's factor of the probability ratio (`use_bias_correction_kl`); advantages not
divided by the group's deviation / divided; learning rate 3e-6 after 10 steps of warm-up, then constant / 1e-6, no
warm-up, falling linearly to 0; completions of at most 300 / 512 tokens; no weight decay, AdamW and a gradient norm of
at most 1 in both; averages over the step's tokens (`dapo`) in both.

Q prompts a step, G completions each, B = Q * G rows, C completion tokens, R reward functions.

| name | shape | what |
| --- | --- | --- |
| `scores` | (B, R) | each reward function's own number |
| `rewards` | (B,) | their weighted sum |
| `advantages` | (B,) | the rewards against the mean of their group |
| `logps`, `old_logps`, `ref_logps` | (B, C) | of the sampled tokens: policy, policy that sampled, frozen reference |
| `shares` | (B, C) | each token's share in the loss; 0 where it is not trained on |
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.data import SYSTEM_PROMPT, Example, encode_prompts
from src.engine.kv_cache import left_pad, unpad
from src.engine.learner import Learner, peak_memory
from src.engine.logprobs import Batch, TokenLoss, accumulate_gradients, batch_logps
from src.engine.processes import Processes
from src.engine.sampling import Completions, Sampler, decode
from src.errors import UserError
from src.reward_set import RewardSet, built_in
from src.rewards import DEFAULT_WEIGHTS, REWARD_FUNCTIONS, answer_accuracy, output_consistency, reasoning
from src.rollout import Rollout, clip_fraction, has_signal, masked_mean, pick_groups, replace_unmixed
from src.seeding import generator
from src.settings import check_fields, flag, machine

SHAPED = (reasoning, output_consistency)  # rewards of the way to an answer, which a wrong answer can earn, too
PARTS = ("sampling", "scoring", "reference", "learning", "optimizer", "waiting")  # of a step, each timed


@dataclass
class GRPOConfig:
    """Settings of the algorithm; each is a flag of train.py."""

    prompts_per_step: int = flag(8, "problems a step, Q", least=1)
    group_size: int = flag(8, "completions a problem, G", least=2)
    max_prompt_tokens: int = flag(512, "problems with a longer prompt are left out", least=2)
    max_completion_tokens: int = flag(300, "a completion is cut off here", least=1)
    temperature: float = flag(1.0, "of sampling, and of every log-probability", above=0)
    learning_rate: float = flag(3e-6, "of AdamW, after the warm-up", above=0)
    warmup_steps: int = flag(10, "steps over which the learning rate rises to its value", least=0)
    max_grad_norm: float = flag(1.0, "a longer gradient is scaled down to this norm", above=0)
    kl_coef: float = flag(0.001, "weight of the KL term that holds the policy near the reference; 0: none", least=0)
    clip_eps: float = flag(0.2, "the probability ratio is clipped to 1 - this and 1 + this", above=0, below=1)
    clip_eps_high: float | None = flag(None, "the upper bound is 1 + this instead (DAPO: 0.28)", above=0)
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = flag(
        "dapo", "average over tokens: per completion (grpo), over the step (dapo), over the longest length (dr_grpo)"
    )
    scale_advantages: bool = flag(False, "divide by the group's standard deviation (DeepSeekMath; false: Dr. GRPO)")
    updates_per_rollout: int = flag(1, "optimizer steps on each batch of completions", least=1)
    mask_truncated: bool = flag(False, "learn nothing from completions that were cut off (DAPO)")
    dynamic_sampling: int = flag(0, "times that others are drawn for groups all right or all wrong (DAPO)", least=0)
    reward_weights: list[float] = flag(
        list(DEFAULT_WEIGHTS), "of formatting, reasoning, output consistency, answer accuracy"
    )
    shaped_rewards: Literal["always", "solved", "right"] = flag(
        "right", "reasoning and output consistency count: always, in groups with a right answer, in right answers"
    )
    rewards: str | None = flag(None, "other rewards: FILE.py:NAME=WEIGHT,... by name from the file or built in")
    token_budget: int = machine(4096, "completion tokens in a micro-batch; changes memory, speed, rounding", least=1)

    def __post_init__(self) -> None:
        check_fields(self)
        names = [function.__name__ for function in REWARD_FUNCTIONS]
        if len(self.reward_weights) != len(names) or not all(math.isfinite(w) for w in self.reward_weights):
            raise UserError(f"--reward_weights is {self.reward_weights}: give {len(names)}, for {', '.join(names)}.")
        if self.rewards is not None and self.reward_weights != list(DEFAULT_WEIGHTS):
            raise UserError("--rewards has the weights of its rewards in it: leave --reward_weights out.")


def weighted_rewards(scores: Tensor, weights: Tensor, shaped: Tensor, paid: Tensor) -> Tensor:
    """The weighted sum of the scores: (B, R), (R,), (R,) bool, (B,) bool -> (B,).

    Those that are `shaped` count only where they are `paid`. Equal scores have equal sums, to the bit.
    """
    return (scores * weights * (~shaped | paid[:, None])).sum(-1)


def group_advantages(rewards: Tensor, group_size: int, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """(reward - group mean) / (group standard deviation + eps), n - 1 in the deviation: (B,) -> (B,).

    DeepSeekMath, section 4.1.2. scale False leaves the division out (Dr. GRPO, arXiv:2503.20783). Equal rewards give
    exactly 0, whatever rounding would leave of them.
    """
    groups = rewards.view(-1, group_size)  # (Q, G)
    centred = groups - groups.mean(-1, keepdim=True)
    centred = torch.where(has_signal(rewards, group_size)[:, None], centred, 0.0)
    return (centred / (groups.std(-1, keepdim=True) + eps) if scale else centred).flatten()


def token_shares(mask: Tensor, loss_type: str, max_completion_tokens: int) -> Tensor:
    """The share of each token in the loss of the whole step, from the tokens trained on: (B, C) bool -> (B, C).

    grpo: the mean over rows of each row's mean (DeepSeekMath, eq. 3); dapo: the mean over all tokens
    (arXiv:2503.14476, eq. 8); dr_grpo: the sum divided by rows * max_completion_tokens (arXiv:2503.20783).
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
    shares: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """The clipped policy loss plus `kl_coef` times KL, summed with `shares` (DeepSeekMath, eq. 3, negated).

    One entry a token, in any shape, `advantages` too (or one that broadcasts) -> scalar. The tokens may be any part of
    the step: the losses of the parts add up to that of the whole.
    """
    ratio = (logps - old_logps).exp()
    high = clip_eps if clip_eps_high is None else clip_eps_high
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + high) * advantages)
    if ref_logps is not None:
        loss = loss + kl_coef * kl_estimate(logps, ref_logps)
    return (loss * shares).sum()


class GRPOTrainer(Learner):
    """Trains `model` in place. The reference is the model as it is now; without a KL term there is none.

    Only the trained weights of the reference are kept: with LoRA that is a copy of the adapter, not of the model.

    seed: of the sampling. rewards: the built-in ones, weighted as `config` says, when left out. system_prompt: before
    every question. processes: that share the work; each samples and learns from its own part of the problems.
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
        processes: Processes | None = None,
    ):
        super().__init__(model, config.max_grad_norm, config.token_budget, processes)
        self.rewards, self.system_prompt = rewards or built_in(config.reward_weights), system_prompt
        self.tokenizer, self.sampler, self.config, self.seed = tokenizer, sampler, config, seed
        trained = self.optimizer.params.items()
        self.reference = {name: p.detach().clone() for name, p in trained} if config.kl_coef else None

    def step(
        self, step: int, examples: Sequence[Example], draw: Callable[[int], Sequence[Example]] | None = None
    ) -> tuple[dict[str, float], Rollout]:
        """One step (numbered from 0) on these problems. Returns its metrics, and its completions.

        draw: other problems, as many, for each attempt (from 1) of `dynamic_sampling`.
        """
        c, self.seconds = self.config, dict.fromkeys(PARTS, 0.0)
        clip = {"clip_eps": c.clip_eps, "clip_eps_high": c.clip_eps_high}

        # 1. Sample: G completions for each of the Q problems, of which each process takes a share.
        batch, sampled = self.sample(step, 0, examples)

        # 2. Score: R numbers a completion, and their weighted sum; from here on all processes know the whole step.
        rollout = self.score(examples, batch, sampled)
        rollout = self.resample_unmixed(step, rollout, draw)
        rewards = self.total_rewards(rollout)  # (B,)

        # 3. Advantages: how much better each completion is than its group; and each token's share in the step.
        advantages = group_advantages(rewards, c.group_size, c.scale_advantages)  # (B,)
        batch, mask = rollout.batch, rollout.batch.completion_mask
        if c.mask_truncated:
            mask = mask & ~rollout.sampled.truncated[:, None]
        shares = token_shares(mask, c.loss_type, c.max_completion_tokens)  # (B, C)
        taught = mask.any(-1)  # (B,)
        if self.reference is None:  # then rows with advantage 0 have no gradient: skipped, though they count above
            taught &= advantages != 0
        rows = taught.nonzero()[:, 0]

        # 4. Learn: the first update is on the policy that sampled, so its own log-probabilities are the old ones.
        lr, updates, old_logps, ref_logps = self.learning_rate(step), [], None, self.reference_logps(batch, rows)

        def loss(row: Tensor, column: Tensor, logps: Tensor) -> Tensor:
            old = logps.detach() if old_logps is None else old_logps[row, column]
            ref = None if ref_logps is None else ref_logps[row, column]
            return grpo_loss(logps, old, ref, advantages[row], shares[row, column], kl_coef=c.kl_coef, **clip)

        for _ in range(c.updates_per_rollout):
            logps, update = self.update(batch, rows, loss, lr)
            old_logps = logps if old_logps is None else old_logps
            updates.append(update | {"clip_fraction": clip_fraction(logps, old_logps, advantages, mask, **clip)})

        seconds, computed = self.processes.mean(self.seconds), batch.completion_mask & taught[:, None]  # (B, C)
        metrics = rollout.metrics(rewards, advantages, self.rewards.names) | {
            "loss": updates[0]["loss"],
            "kl": 0.0 if ref_logps is None else masked_mean(kl_estimate(old_logps, ref_logps), computed),
            "grad_norm": updates[0]["grad_norm"],
            "lr": lr,
            "clip_fraction": sum(update["clip_fraction"] for update in updates) / len(updates),
            "logp_gap": masked_mean((old_logps - rollout.sampled.logps).abs(), computed),
            "skipped_steps": float(self.skipped_steps),
            "peak_memory": peak_memory(self.device),
        }
        metrics |= {f"seconds/{name}": value for name, value in seconds.items()}
        total, tokens = sum(seconds.values()), float(rollout.sampled.mask.sum())
        return metrics | {"seconds": total, "tokens_per_second": tokens / total}, rollout

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant."""
        return self.config.learning_rate * min(1.0, (step + 1) / max(1, self.config.warmup_steps))

    def sample(self, step: int, attempt: int, examples: Sequence[Example]) -> tuple[Batch, Completions]:
        """A group of completions for each of this process's problems, from the policy at the sampling temperature."""
        c, mine = self.config, self.processes.problems(len(examples))
        with self._timed("sampling"):
            prompts = encode_prompts(self.tokenizer, [examples[q].question for q in mine], self.system_prompt)
            shape = (len(examples), c.group_size, c.max_completion_tokens)  # (Q, G, C)
            uniforms = torch.rand(shape, generator=generator(self.seed, "sampling", step, attempt))[mine].flatten(0, 1)
            options = {"max_new_tokens": c.max_completion_tokens, "temperature": c.temperature}
            sampled = self.sampler.generate(prompts, group_size=c.group_size, uniforms=uniforms, **options)
            padded = left_pad(prompts, self.sampler.pad_id, self.device)
        return Batch(*padded, sampled.ids, sampled.mask), sampled

    def score(self, examples: Sequence[Example], batch: Batch, sampled: Completions) -> Rollout:
        """Every reward function on every completion; and `right`: whether its answer is, whatever is rewarded.

        batch, sampled: of this process's problems; the rollout is that of all `examples`.
        """
        mine = [examples[q] for q in self.processes.problems(len(examples))]

        def work() -> Rollout:
            texts = decode(self.tokenizer, unpad(sampled.ids, sampled.mask))
            problems = [example for example in mine for _ in range(self.config.group_size)]
            scores = self.rewards.score(texts, problems, unpad(sampled.ids, sampled.mask))
            right = [answer_accuracy(text, problem.answer) == 1 for text, problem in zip(texts, problems, strict=True)]
            tensors = torch.tensor(scores, device=self.device), torch.tensor(right, device=self.device)
            return Rollout(mine, batch, sampled, texts, *tensors)

        with self._timed("scoring"):
            rollouts = self.processes.gather(work)
        return pick_groups(rollouts, self.processes.owners(len(examples))) if len(rollouts) > 1 else rollouts[0]

    def resample_unmixed(self, step: int, rollout: Rollout, draw: Callable[[int], Sequence[Example]]) -> Rollout:
        """Other problems' groups for those that are all right or all wrong, as far as attempts go (DAPO, eq. 11)."""
        asked = {example.question for example in rollout.examples}
        for attempt in range(1, self.config.dynamic_sampling + 1):
            missing = int((~rollout.mixed_groups()).sum())
            if examples := [example for example in draw(attempt) if example.question not in asked][:missing]:
                asked |= {example.question for example in examples}
                rollout = replace_unmixed(rollout, self.score(examples, *self.sample(step, attempt, examples)))
        return rollout

    def total_rewards(self, rollout: Rollout) -> Tensor:
        """The rewards (B,): the weighted sum of the scores, where `shaped_rewards` says which ones count."""
        right, size = rollout.right, self.config.group_size
        solved = right.view(-1, size).any(-1).repeat_interleave(size)
        paid = {"always": torch.ones_like(right), "solved": solved, "right": right}[self.config.shaped_rewards]
        shaped = torch.tensor([reward.function in SHAPED for reward in self.rewards.rewards], device=self.device)
        return weighted_rewards(rollout.scores, rollout.scores.new_tensor(self.rewards.weights), shaped, paid)

    def reference_logps(self, batch: Batch, rows: Tensor) -> Tensor | None:
        """Log-probabilities (B, C) of these rows under the reference, if there is one."""
        if self.reference is None:
            return None
        mine, temperature = self.processes.rows(rows, batch.group_size), self.config.temperature
        with self._timed("reference"), self.reference_weights():
            return self._added_up(lambda budget: [batch_logps(self.model, batch, mine, temperature, budget)])[0]

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

    def update(self, batch: Batch, rows: Tensor, loss: TokenLoss, lr: float) -> tuple[Tensor, dict[str, float]]:
        """One optimizer step on the sum of `loss`. Returns the log-probabilities (B, C) before it, loss and norm."""
        mine, temperature = self.processes.rows(rows, batch.group_size), self.config.temperature

        def accumulate(budget: int) -> tuple[Tensor, Tensor]:
            return accumulate_gradients(self.model, batch, mine, loss, temperature=temperature, token_budget=budget)

        with self._timed("learning"):
            logps, total = self._added_up(accumulate)
            value = float(total)
        with self._timed("optimizer"):
            norm = self._apply(lr, value)
        return logps, {"loss": value, "grad_norm": norm}
