"""How sure a measured share or difference is: intervals, the paired test, and the estimate of pass@k."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, variance
from typing import NamedTuple

Z = 1.959964  # 95%, two-sided
DRAWS = 10_000  # of signs in a permutation test


class Difference(NamedTuple):
    """How much better one model does than another on the same problems."""

    difference: float
    low: float
    high: float
    gained: int  # problems on which it does better
    lost: int
    p: float  # two-sided, of the mean difference


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

    Wilson's interval at the effective sample size, p (1 - p) / variance of the mean: answers to one problem are alike,
    so together they count for `draws` at most. The variance is estimated from the problems, which the squared ratio of
    Student's t pays for (Korn and Graubard 1998). With `draws` 1 a problem counts for one answer: Wilson's interval
    itself for values of 0 and 1, for others too wide rather than too narrow.
    """
    share, problems = fmean(values), len(values)
    size = float(problems)
    if draws > 1 and problems > 1 and 0 < share < 1:
        spread = variance(values)
        size *= min(draws, share * (1 - share) / spread) if spread else draws
        size *= (_student_t(problems * draws - 1) / _student_t(problems - 1)) ** 2
    return wilson_interval(share * size, size)


def _student_t(freedom: int) -> float:
    """Student's t in the place of Z, 11% too small for 1 degree of freedom, 0.8% for 2 (Abramowitz, Stegun 26.7.5)."""
    return Z + sum(c / freedom**i for i, c in enumerate((2.37227, 2.82250, 2.55585, 1.58953), start=1))


def paired_difference(values: Sequence[float], other: Sequence[float]) -> Difference:
    """How much higher `values` are than `other`, problem by problem, with its 95% interval and p-value.

    The interval is Bonett and Price's (2012), an adjusted Wald interval that adds one problem gained and one lost; it
    holds its level with few problems and none that differ. The test is `sign_flip_p`.
    """
    differences = [a - b for a, b in zip(values, other, strict=True)]
    adjusted = [*differences, 1.0, -1.0]
    centre = fmean(adjusted)
    half = Z * math.sqrt(fmean((d - centre) ** 2 for d in adjusted) / len(adjusted))
    gained, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return Difference(fmean(differences), low, high, gained, lost, sign_flip_p(differences))


def sign_flip_p(differences: Sequence[float]) -> float:
    """The two-sided p-value of their mean when each might as well have had the other sign.

    Exact where all that are not 0 are of one size, as with values of 0 and 1: McNemar's test. Otherwise from `DRAWS`
    draws, always the same ones, and the observed signs (Phipson and Smyth 2010), so never below 1 / (DRAWS + 1).
    """
    rounded = [round(d, 12) for d in differences]  # a third is a third, from whichever fractions it was made
    sizes = Counter(abs(d) for d in rounded if d)
    if len(sizes) < 2:
        return mcnemar_p(sum(d > 0 for d in rounded), sum(d < 0 for d in rounded))
    rng, observed, as_extreme = random.Random(0), abs(sum(rounded)) - 1e-9, 1
    for _ in range(DRAWS):  # the number of heads among n coins is the number of ones among n bits
        total = sum(size * (2 * rng.getrandbits(n).bit_count() - n) for size, n in sizes.items())
        as_extreme += abs(total) >= observed
    return as_extreme / (DRAWS + 1)


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
