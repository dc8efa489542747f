"""Accuracy on problems, with its interval: the one evaluation behind validation and test.py."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, multimode
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.arithmetic import answer_key, numbers_in, parse_number
from src.data import SYSTEM_PROMPT, Example, encode_prompts
from src.engine.processes import Processes
from src.engine.sampling import Sampler, decode
from src.intervals import Difference, mean_interval, paired_difference, pass_at_k
from src.reward_set import RewardSet, built_in
from src.rewards import answer_accuracy, formatting, has_calculation, parse_completion
from src.seeding import generator


@dataclass(frozen=True)
class Scored:
    """One answer to one problem, and what it earned."""

    example: Example
    completion: str
    tokens: int
    truncated: bool
    rewards: dict[str, float]  # each reward function's own number
    correct: bool  # strict: the one number in the answer field
    correct_lenient: bool  # the last number anywhere in the completion
    formatted: bool  # the exact form, with nothing around it


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set of problems, in their order; the k answers to one problem stand side by side."""

    scored: list[Scored]
    k: int = 1

    def problems(self) -> list[list[Scored]]:
        """The answers to each problem."""
        return [self.scored[start : start + self.k] for start in range(0, len(self.scored), self.k)]

    def describe(self) -> list[dict[str, Any]]:
        """Each problem with its completions, for a JSON file."""
        problems = self.problems()
        rows = [[{n: v for n, v in vars(s).items() if n != "example"} for s in answers] for answers in problems]
        return [asdict(p[0].example) | {"completions": own} for p, own in zip(problems, rows, strict=True)]

    def measures(self) -> dict[str, list[float]]:
        """What is a share of the problems, one value in [0, 1] a problem."""
        problems, k = self.problems(), self.k
        right = [sum(s.correct for s in answers) for answers in problems]
        values = {
            "accuracy": [count / k for count in right],
            "accuracy_lenient": [fmean(s.correct_lenient for s in answers) for answers in problems],
            "format_rate": [fmean(s.formatted for s in answers) for answers in problems],
        }
        if k > 1:
            sizes = sorted({k, *(2**i for i in range(1, k.bit_length()))})  # pass@1 is the accuracy
            values |= {f"pass@{size}": [pass_at_k(k, count, size) for count in right] for size in sizes}
            values[f"majority@{k}"] = [majority(answers) for answers in problems]
        return values

    def metrics(self, weights: Sequence[float]) -> dict[str, float]:
        """What goes to logs/metrics.jsonl, `eval/...`; weights: of the rewards, for their sum."""
        metrics: dict[str, float] = {}
        for name, values in self.measures().items():
            low, high = mean_interval(values, 1 if "@" in name else self.k)
            metrics |= {f"eval/{name}": fmean(values), f"eval/{name}_low": low, f"eval/{name}_high": high}
        means = {name: fmean(s.rewards[name] for s in self.scored) for name in self.scored[0].rewards}
        return metrics | {
            "eval/reward": sum(w * mean for w, mean in zip(weights, means.values(), strict=True)),
            **{f"eval/reward/{name}": mean for name, mean in means.items()},
            "eval/completion_tokens": fmean(s.tokens for s in self.scored),
            "eval/truncated": fmean(s.truncated for s in self.scored),
            "eval/reasoning_without_calculation": fmean(not has_calculation(s.completion) for s in self.scored),
            "eval/samples": len(self.problems()),
        }

    def compare(self, other: "Evaluation") -> dict[str, Difference]:
        """How much better this model does than another on the same problems, measure by measure."""
        theirs = other.measures()
        return {name: paired_difference(values, theirs[name]) for name, values in self.measures().items()}


def majority(answers: Sequence[Scored]) -> float:
    """Whether the most frequent answer is right (self-consistency, Wang et al. 2022).

    Each answer field is a vote for its value; a completion without one has no vote. Where several values lead, each
    wins with the same chance, and the chance that a right one wins is returned.
    """
    truth = answers[0].example.answer
    votes = [answer_key(parse_completion(scored.completion).answer or "", truth) for scored in answers]
    leaders = multimode(vote for vote in votes if vote not in (None, ""))
    return (answer_key(truth, truth) in leaders) / max(1, len(leaders))


def fixed_subset(examples: Sequence[Example], count: int, seed: int = 0) -> list[Example]:
    """`count` random problems (0: all, in their order) that depend on the seed and the questions alone.

    Those with the smallest hashes: 100 problems are the first of 200, and neither the order of the data nor a problem
    left out changes which others are chosen. Data often come sorted, so the first rows would not do.
    """
    if not count:
        return list(examples)
    return sorted(examples, key=lambda e: hashlib.sha256(f"{seed}/{e.question}".encode()).digest())[:count]


def last_number_is(text: str, answer: str) -> bool:
    """Whether the last number anywhere in the text is the answer's ("5 stamps" has 5); without one it never is."""
    numbers = numbers_in(text)
    return bool(numbers) and numbers[-1] == parse_number(answer)


def evaluate(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_completion_tokens: int,
    rewards: RewardSet | None = None,
    system_prompt: str = SYSTEM_PROMPT,
    *,
    k: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    on_progress: Callable[[list[Scored]], object] = lambda new: None,
    processes: Processes | None = None,
) -> Evaluation:
    """Answer every problem k times, greedily at temperature 0.

    rewards: the built-in ones when left out; on_progress: called every few tokens with the answers completed since the
    last call, in any order; processes: that share the problems, each of which sees its own progress and the whole
    result.
    """
    rewards, processes = rewards or built_in(), processes or Processes()
    mine = processes.problems(len(examples))
    prompts = encode_prompts(tokenizer, [examples[q].question for q in mine], system_prompt)
    shape = (len(examples), k, max_completion_tokens)  # (Q, k, C)
    uniforms = torch.rand(shape, generator=generator(seed, "evaluation"))[mine].flatten(0, 1) if temperature else None
    scored: dict[int, Scored] = {}

    def look(done: int, ids: Tensor) -> None:
        """Score the rows that have ended since the last look."""
        new: list[Scored] = []
        if done > len(scored):
            ended = torch.isin(ids, sampler.end_ids).any(-1)
            rows = [row for row in (ended | (ids[:, -1] >= 0)).nonzero()[:, 0].tolist() if row not in scored]
            new = _score(tokenizer, rewards, [examples[mine[row // k]] for row in rows], ids[rows], ~ended[rows])
            scored.update(zip(rows, new, strict=True))
        on_progress(new)

    def work() -> list[Scored]:
        options = {"group_size": k, "max_new_tokens": max_completion_tokens, "temperature": temperature}
        sampler.generate(prompts, **options, uniforms=uniforms, on_progress=look)
        return [scored[row] for row in range(len(scored))]

    parts, owners = processes.gather(work), processes.owners(len(examples))
    return Evaluation([parts[rank][k * place + i] for rank, place in owners for i in range(k)], k)


def _score(
    tokenizer: PreTrainedTokenizerBase, rewards: RewardSet, examples: Sequence[Example], ids: Tensor, truncated: Tensor
) -> list[Scored]:
    """Read and score completions (b, C), -1 where nothing was sampled."""
    rows = [[token for token in row if token >= 0] for row in ids.tolist()]
    texts = decode(tokenizer, rows)
    scores = [dict(zip(rewards.names, row, strict=True)) for row in rewards.score(texts, examples, rows)]
    return [
        Scored(
            example=example,
            completion=text,
            tokens=len(row),
            truncated=cut,
            rewards=earned,
            correct=answer_accuracy(text, example.answer) == 1.0,
            correct_lenient=last_number_is(text, example.answer),
            formatted=formatting(text, example.answer) == 1.0,
        )
        for example, text, row, cut, earned in zip(examples, texts, rows, truncated.tolist(), scores, strict=True)
    ]
