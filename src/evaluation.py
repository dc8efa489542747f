"""Greedy accuracy on problems, with its interval: the one evaluation behind validation and test.py."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from src.data import SYSTEM_PROMPT, Example, encode_prompts
from src.reward_set import RewardSet, built_in, token_ids
from src.rewards import answer_accuracy, numbers_in, parse_number
from src.sampling import Sampler, decode


@dataclass(frozen=True)
class Scored:
    """One problem, what the model made of it, and what that earned."""

    example: Example
    completion: str
    tokens: int
    truncated: bool
    rewards: dict[str, float]
    correct: bool  # strict: the one number in the answer field
    correct_lenient: bool  # the last number anywhere in the completion


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set of problems, in their order."""

    scored: list[Scored]

    @property
    def accuracy(self) -> float:
        return fmean(s.correct for s in self.scored)

    @property
    def accuracy_lenient(self) -> float:
        return fmean(s.correct_lenient for s in self.scored)

    def metrics(self, weights: Sequence[float]) -> dict[str, float]:
        """What goes to logs/metrics.jsonl, `eval/...`; weights: of the rewards, for their sum."""
        low, high = wilson_interval(sum(s.correct for s in self.scored), len(self.scored))
        means = {name: fmean(s.rewards[name] for s in self.scored) for name in self.scored[0].rewards}
        return {
            "eval/accuracy": self.accuracy,
            "eval/accuracy_low": low,
            "eval/accuracy_high": high,
            "eval/accuracy_lenient": self.accuracy_lenient,
            "eval/reward": sum(w * mean for w, mean in zip(weights, means.values(), strict=True)),
            **{f"eval/reward/{name}": mean for name, mean in means.items()},
            "eval/completion_tokens": fmean(s.tokens for s in self.scored),
            "eval/truncated": fmean(s.truncated for s in self.scored),
            "eval/samples": len(self.scored),
        }


def wilson_interval(successes: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% score interval of a proportion (Wilson 1927); (0, 1) when there is nothing to go by."""
    if total == 0:
        return 0.0, 1.0
    share, spread = successes / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def last_number_is(text: str, answer: str) -> bool:
    """Whether the last number anywhere in the text is the answer; an answer that is no number is never met."""
    numbers = numbers_in(text)
    return bool(numbers) and numbers[-1] == parse_number(answer)


def evaluate(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_completion_tokens: int,
    rewards: RewardSet | None = None,
    system_prompt: str = SYSTEM_PROMPT,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Answer every problem once, greedily.

    rewards: the built-in ones when left out; on_progress: called with the number of problems done so far.
    """
    rewards = rewards or built_in()
    prompts = encode_prompts(tokenizer, [example.question for example in examples], system_prompt)
    report = None if on_progress is None else (lambda done, _: on_progress(done))
    sampled = sampler.generate(prompts, max_new_tokens=max_completion_tokens, on_progress=report)
    texts = decode(tokenizer, sampled)
    scores = rewards.score(texts, examples, token_ids(sampled.ids, sampled.mask))
    lengths, truncated = sampled.mask.sum(-1).tolist(), sampled.truncated.tolist()
    return Evaluation(
        [
            Scored(
                example=example,
                completion=text,
                tokens=lengths[i],
                truncated=truncated[i],
                rewards=dict(zip(rewards.names, scores[i], strict=True)),
                correct=answer_accuracy(text, example.answer) == 1.0,
                correct_lenient=last_number_is(text, example.answer),
            )
            for i, (example, text) in enumerate(zip(examples, texts, strict=True))
        ]
    )
