"""The rewards a run uses: their names, weights and functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from src.data import Example
from src.rewards import DEFAULT_WEIGHTS, REWARD_FUNCTIONS


@dataclass(frozen=True)
class Reward:
    """One reward: what it is called in metrics, what it counts for in the sum, and the function."""

    name: str
    weight: float
    function: Callable[..., float]


@dataclass(frozen=True)
class RewardSet:
    """R rewards in the order of their columns."""

    rewards: tuple[Reward, ...]

    @property
    def names(self) -> list[str]:
        return [reward.name for reward in self.rewards]

    @property
    def weights(self) -> list[float]:
        return [reward.weight for reward in self.rewards]

    def score(
        self,
        completions: Sequence[str],
        examples: Sequence[Example],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[list[float]]:
        """Every reward of every completion, unweighted, (B, R). examples: the problem of each completion."""
        pairs = list(zip(completions, examples, strict=True))
        return [[reward.function(text, example.answer) for reward in self.rewards] for text, example in pairs]


def built_in(weights: Sequence[float] = DEFAULT_WEIGHTS) -> RewardSet:
    """The four rewards of `src.rewards`."""
    pairs = zip(REWARD_FUNCTIONS, weights, strict=True)
    return RewardSet(tuple(Reward(function.__name__, weight, function) for function, weight in pairs))
