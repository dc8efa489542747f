"""How sure a measured share or difference is: intervals, the paired test, and the estimate of pass@k."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

Z = 1.959964  # 95%, two-sided


class Difference(NamedTuple):
    """How much better one model does than another on the same problems."""

    difference: float
    low: float
    high: float
    gained: int  # problems on which it does better
    lost: int
    p: float  # McNemar's exact test


def wilson_interval(successes: float, total: float) -> tuple[float, float]:
    """The 95% score interval of a proportion (Wilson 1927); (0, 1) when there is nothing to go by."""
    if total == 0:
        return 0.0, 1.0
    share, spread = successes / total, Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], draws: int = 1) -> tuple[float, float]:
    """The 95% interval of the mean of one value in [0, 1] a problem, itself the mean of `draws` answers.

    Wilson's interval at the effective sample size, p (1 - p) / variance of the mean (Korn and Graubard 1998): answers
    to one problem are alike, so together they count for one answer at least and for `draws` at most. For values of 0
    and 1 it is Wilson's interval itself, for other values with `draws` 1 it is too wide rather than too narrow.
    """
    share, size = fmean(values), float(len(values))
    if 0 < share < 1:
        variance = fmean((value - share) ** 2 for value in values)
        size *= min(draws, share * (1 - share) / variance) if variance else draws
    return wilson_interval(share * size, size)


def paired_difference(values: Sequence[float], other: Sequence[float]) -> Difference:
    """How much higher `values` are than `other`, problem by problem, with its 95% interval and McNemar's exact p.

    The interval is Bonett and Price's (2012), an adjusted Wald interval that adds one problem gained and one lost; it
    holds its level with few problems and none that differ. With several answers a problem the values are means, and
    the test is the exact sign test, which McNemar's is for values of 0 and 1.
    """
    differences = [a - b for a, b in zip(values, other, strict=True)]
    adjusted = [*differences, 1.0, -1.0]
    centre = fmean(adjusted)
    half = Z * math.sqrt(fmean((d - centre) ** 2 for d in adjusted) / len(adjusted))
    gained, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return Difference(fmean(differences), low, high, gained, lost, mcnemar_p(gained, lost))


def mcnemar_p(gained: int, lost: int) -> float:
    """The exact two-sided p-value of so many problems gained and lost when both models are equally good."""
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The chance that one of k answers is right, without bias, from `answers` >= k of which `right` are right.

    Chen et al. 2021, "Evaluating large language models trained on code", equation 1.
    """
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)
