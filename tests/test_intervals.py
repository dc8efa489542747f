"""Intervals and tests against published figures, hand counts and simulation."""

import itertools
import random
from math import comb
from statistics import fmean

import pytest

from src import intervals
from src.intervals import mcnemar_p, mean_interval, paired_difference, pass_at_k, sign_flip_p, wilson_interval


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [  # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(successes: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(total - successes, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_interval_of_nothing_is_everything() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("successes", [0, 1, 7, 19, 20])
def test_of_one_answer_a_problem_the_interval_is_wilsons(successes: int) -> None:
    values = [1.0] * successes + [0.0] * (20 - successes)
    assert mean_interval(values) == pytest.approx(wilson_interval(successes, 20))


def test_answers_to_one_problem_count_for_less_the_more_they_are_alike() -> None:
    alike, unlike, none = [1.0, 0.0] * 10, [0.5] * 20, [0.0] * 20  # four answers a problem
    t_factor = (1.9905 / 2.0930) ** 2  # published quantiles, of 79 degrees of freedom and of 19
    size = 20 * 19 / 20 * t_factor  # p (1 - p) = 0.25, and the variance of ten ones and ten noughts is 5 / 19
    assert mean_interval(alike, 4) == pytest.approx(wilson_interval(size / 2, size), abs=5e-5)
    size = 80 * t_factor
    assert mean_interval(unlike, 4) == pytest.approx(wilson_interval(size / 2, size), abs=5e-5)
    assert mean_interval(none, 4) == wilson_interval(0, 20)
    assert mean_interval([0.5], 4) == wilson_interval(0.5, 1)  # of how problems differ, one says nothing


@pytest.mark.parametrize(("freedom", "t"), [(2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (29, 2.0452)])
def test_students_t_is_the_published_one(freedom: int, t: float) -> None:
    assert intervals._student_t(freedom) == pytest.approx(t, rel=0.01 if freedom == 2 else 0.002)


@pytest.mark.parametrize(("a", "b"), [(0.3, 1.5), (2, 2), (20, 5)])
@pytest.mark.parametrize("problems", [20, 100])
def test_the_interval_holds_the_truth_in_about_19_of_20_simulated_evaluations(
    a: float, b: float, problems: int
) -> None:
    """Problems whose chance of a right answer is Beta(a, b), four answers each."""
    rng, truth, hits = random.Random(0), a / (a + b), 0
    for _ in range(600):
        chances = [rng.betavariate(a, b) for _ in range(problems)]
        low, high = mean_interval([fmean(rng.random() < chance for _ in range(4)) for chance in chances], 4)
        hits += low <= truth <= high
    assert 0.93 <= hits / 600 <= 0.98


def test_the_paired_interval_and_p_are_those_of_a_worked_example() -> None:
    """Bentur et al. 2009, as in Fagerland, Lydersen and Laake 2014: of 21 children 1 changed one way, 7 the other."""
    before, after = [1.0] * 1 + [1.0] * 1 + [0.0] * 7 + [0.0] * 12, [1.0] * 1 + [0.0] * 1 + [1.0] * 7 + [0.0] * 12
    d = paired_difference(before, after)
    assert (d.gained, d.lost) == (1, 7)
    assert d.difference == pytest.approx(-6 / 21)
    # With one more on either side: 2/23 - 8/23, and the variance (10/23 - (6/23)^2) / 23.
    half = 1.959964 * ((10 / 23 - (6 / 23) ** 2) / 23) ** 0.5
    assert (d.low, d.high) == pytest.approx((-6 / 23 - half, -6 / 23 + half))
    assert d.p == pytest.approx(2 * (1 + 8) / 2**8)


def test_models_that_never_differ_may_still_differ_by_a_little() -> None:
    d = paired_difference([1.0] * 50, [1.0] * 50)
    assert (d.difference, d.p) == (0.0, 1.0)
    assert -0.1 < d.low < 0 < d.high < 0.1


def test_models_swapped_swap_the_signs() -> None:
    first, second = [1.0, 0.5, 0.0, 0.25, 1.0], [0.0, 0.5, 0.25, 0.0, 0.75]
    forth, back = paired_difference(first, second), paired_difference(second, first)
    assert (forth.difference, forth.low, forth.high) == pytest.approx((-back.difference, -back.high, -back.low))
    assert (forth.gained, forth.lost, forth.p) == (back.lost, back.gained, back.p)
    assert (forth.gained, forth.lost) == (3, 1)
    assert forth.p == pytest.approx(8 / 16, abs=0.02)  # +-1 +-1/4 +-1/4 +-1/4 is 5/4 or more in 4 cases of 16


def test_the_permutation_test_of_darwins_maize_is_fishers() -> None:
    """Fisher 1935, "The design of experiments", section 21: of 32,768 arrangements 863 reach as high a sum."""
    differences = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert sign_flip_p([d / 75 for d in differences]) == pytest.approx(2 * 863 / 32768, abs=0.006)


def test_of_right_and_wrong_the_permutation_test_is_mcnemars_however_large_a_step_is() -> None:
    for size in (1.0, 1 / 3):
        assert sign_flip_p([size] * 9 + [-size] + [0.0] * 40) == 22 / 1024
    thirds = [2 / 3 - 1 / 3] * 5 + [1 - 2 / 3] * 4 + [1 / 3 - 2 / 3]  # of one size, but for rounding
    assert sign_flip_p(thirds) == 22 / 1024
    almost = [1.0] * 9 + [-1.0] + [1e-6]  # two sizes: drawn, and all but the same
    assert sign_flip_p(almost) == pytest.approx(12 / 1024, abs=0.006)  # 10 right, or 9 and the crumb, of either sign


def test_models_of_equal_accuracy_are_told_apart_in_one_comparison_of_20_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is a little better on nine problems of ten and much worse on the tenth; eight answers each.

    A test on the number of problems gained and lost finds a difference, and there is none in the mean.
    """
    monkeypatch.setattr(intervals, "DRAWS", 1000)
    rng, alarms, sign_alarms = random.Random(2), 0, 0

    def answered(problems: int, chance: float) -> list[float]:
        weights = [comb(8, right) * chance**right * (1 - chance) ** (8 - right) for right in range(9)]
        return [right / 8 for right in rng.choices(range(9), weights, k=problems)]

    for _ in range(200):
        hard = sum(rng.random() < 0.1 for _ in range(800))
        values = answered(hard, 0.05) + answered(800 - hard, 0.55), answered(800, 0.5)
        d = paired_difference(*values)
        alarms += d.p <= 0.05
        sign_alarms += mcnemar_p(d.gained, d.lost) <= 0.05
    assert 0.015 <= alarms / 200 <= 0.09
    assert sign_alarms / 200 >= 0.15


def test_the_paired_interval_holds_the_truth_in_about_19_of_20_simulated_comparisons() -> None:
    """Of 100 problems one model alone solves 8%, the other alone 3%."""
    rng, hits = random.Random(1), 0
    for _ in range(600):
        draws = [rng.random() for _ in range(100)]
        d = paired_difference([float(x < 0.08) for x in draws], [float(0.08 <= x < 0.11) for x in draws])
        hits += d.low <= 0.05 <= d.high
    assert 0.93 <= hits / 600 <= 0.985


@pytest.mark.parametrize(("gained", "lost", "p"), [(0, 0, 1), (1, 0, 1), (5, 5, 1), (0, 6, 2 / 64), (9, 1, 22 / 1024)])
def test_mcnemars_p_is_the_count_of_outcomes_as_extreme(gained: int, lost: int, p: float) -> None:
    assert mcnemar_p(gained, lost) == pytest.approx(p)


def test_mcnemars_p_of_a_whole_benchmark_is_a_number() -> None:
    assert 0 <= mcnemar_p(1319, 0) < 1e-300
    assert mcnemar_p(700, 619) == pytest.approx(0.0276, abs=5e-4)  # z = 80 / sqrt(1319), continuity corrected


@pytest.mark.parametrize(("answers", "right"), [(1, 0), (1, 1), (4, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_that_hold_a_right_one(answers: int, right: int) -> None:
    marks = [True] * right + [False] * (answers - right)
    for k in range(1, answers + 1):
        share = sum(any(chosen) for chosen in itertools.combinations(marks, k)) / comb(answers, k)
        assert pass_at_k(answers, right, k) == pytest.approx(share)
