"""The formulas of GRPO against numbers worked out by hand and against finite differences."""

import math

import pytest
import torch
from torch import Tensor

from src.grpo import group_advantages, grpo_loss, has_signal, kl_estimate, token_shares, weighted_rewards
from src.rollout import clip_fraction

# ratio, advantage, the gain with bounds 0.8 and 1.2, the gain with bounds 0.8 and 1.28, is its gradient cut off
CLIPPING = (
    (1.0, 3.0, 3.0, 3.0, False),
    (1.1, 2.0, 2.2, 2.2, False),
    (1.25, 2.0, 2.4, 2.5, None),  # between the bounds: cut off by 1.2 only
    (1.5, 1.0, 1.2, 1.28, True),
    (1.5, -1.0, -1.5, -1.5, False),
    (0.9, -2.0, -1.8, -1.8, False),
    (0.5, 1.0, 0.5, 0.5, False),
    (0.5, -1.0, -0.8, -0.8, True),
    (0.5, 0.0, 0.0, 0.0, False),
    (1.5, 0.0, 0.0, 0.0, False),
)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_inputs(seed: int) -> dict[str, Tensor]:
    """Log-probabilities whose ratios lie on all sides of the clip bounds, but none near a bound."""
    random = torch.Generator().manual_seed(seed)
    choices = tensor(0.5, 0.7, 0.9, 1.0, 1.1, 1.24, 1.4, 1.7).log()
    logps = -3 * torch.rand(6, 5, generator=random, dtype=torch.float64)
    return {
        "logps": logps.requires_grad_(),
        "old_logps": (logps - choices[torch.randint(0, 8, (6, 5), generator=random)]).detach(),
        "ref_logps": logps.detach() + torch.randn(6, 5, generator=random, dtype=torch.float64) / 2,
        "advantages": torch.randn(6, 1, generator=random, dtype=torch.float64),
        "shares": torch.rand(6, 5, generator=random, dtype=torch.float64),
    }


class TestWeightedRewards:
    SCORES = torch.tensor([[1.0, 0.5, 1.0, 1.0], [1.0, 1.0, 0.5, 0.0]])
    WEIGHTS, SHAPED = torch.tensor([0.3, 0.5, 0.5, 2.0]), torch.tensor([False, True, True, False])

    def test_all_scores_count_where_the_shaped_are_paid_and_the_others_everywhere(self):
        def rewards(*paid: bool) -> list[float]:
            return weighted_rewards(self.SCORES, self.WEIGHTS, self.SHAPED, torch.tensor(paid)).tolist()

        assert rewards(True, True) == pytest.approx([0.3 + 0.25 + 0.5 + 2, 0.3 + 0.5 + 0.25])
        assert rewards(True, False) == pytest.approx([3.05, 0.3])
        assert rewards(False, False) == pytest.approx([2.3, 0.3])

    @pytest.mark.parametrize("rows", [3, 6, 10, 31, 64])
    def test_equal_scores_earn_the_same_to_the_bit_wherever_they_stand(self, rows: int):
        """A product of matrices does not promise that."""
        for seed in range(20):
            scores, weights = torch.rand(2, 4, generator=torch.Generator().manual_seed(seed))
            one = torch.ones(rows, dtype=torch.bool)
            assert len(weighted_rewards(scores.repeat(rows, 1), weights, one.new_zeros(4), one).unique()) == 1


class TestAdvantages:
    def test_they_are_the_rewards_normalised_within_their_group(self):
        # Means 2 and 2; deviations (-1, 0, 1) and (-2, -2, 4); standard deviations, over n - 1, 1 and sqrt(12).
        advantages = group_advantages(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 6.0]), group_size=3)
        low, high = -2 / (12**0.5 + 1e-4), 4 / (12**0.5 + 1e-4)
        assert advantages.tolist() == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001, low, low, high])

    def test_without_scaling_they_are_the_deviations_from_the_mean(self):
        advantages = group_advantages(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 6.0]), group_size=3, scale=False)
        assert advantages.tolist() == pytest.approx([-1, 0, 1, -2, -2, 4])

    @pytest.mark.parametrize("scale", [True, False])
    @pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 8, 64])
    @pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.1 + 0.2, 3.3, 1 / 3, -0.7, 123456.7])
    def test_equal_rewards_give_zero_advantage(self, reward: float, size: int, scale: bool):
        assert group_advantages(torch.full((3 * size,), reward), size, scale).tolist() == [0.0] * (3 * size)

    def test_equal_rewards_of_a_group_do_not_silence_the_next(self):
        advantages = group_advantages(torch.tensor([0.3, 0.3, 0.3, 1.0, 0.0, 0.0]), group_size=3, scale=False)
        assert advantages.tolist() == pytest.approx([0, 0, 0, 2 / 3, -1 / 3, -1 / 3])

    def test_rewards_that_differ_by_a_rounding_error_give_small_advantages(self):
        one = torch.ones(1)
        rewards = torch.cat([one, one, one, one.nextafter(2 * one)])
        assert group_advantages(rewards, 4).abs().max() < 1e-2

    @pytest.mark.parametrize("order", [[3, 1, 0, 2], [2, 3, 1, 0]])
    def test_they_follow_their_rows_when_a_group_is_reordered(self, order: list[int]):
        rewards = torch.tensor([0.3, 2.0, 1.1, 0.0])
        torch.testing.assert_close(group_advantages(rewards[order], 4), group_advantages(rewards, 4)[order])

    def test_a_group_has_signal_when_its_rewards_differ(self):
        rewards = torch.tensor([1.0, 1.0, 0.5, 0.6, 0.0, 0.0])
        assert has_signal(rewards, 2).tolist() == [False, True, False]


class TestTokenShares:
    MASK = torch.tensor([[True, True, False, False], [True, True, True, True], [False] * 4])
    CASES = (
        ("grpo", 4, [[1 / 6, 1 / 6, 0, 0], [1 / 12] * 4, [0] * 4]),  # a row's mean, then the mean over three rows
        ("dapo", 4, [[1 / 6, 1 / 6, 0, 0], [1 / 6] * 4, [0] * 4]),  # six tokens in all
        ("dr_grpo", 4, [[1 / 12, 1 / 12, 0, 0], [1 / 12] * 4, [0] * 4]),  # three rows times four
        ("dr_grpo", 10, [[1 / 30, 1 / 30, 0, 0], [1 / 30] * 4, [0] * 4]),  # three rows times ten
        ("grpo", 10, [[1 / 6, 1 / 6, 0, 0], [1 / 12] * 4, [0] * 4]),
    )

    @pytest.mark.parametrize(("loss_type", "longest", "expected"), CASES)
    def test_a_token_has_its_share_of_the_step(self, loss_type: str, longest: int, expected: list[list[float]]):
        shares = token_shares(self.MASK, loss_type, longest)
        torch.testing.assert_close(shares, torch.tensor(expected))

    @pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
    def test_nothing_to_train_on_has_no_share(self, loss_type: str):
        assert token_shares(torch.zeros(2, 3, dtype=torch.bool), loss_type, 3).eq(0).all()

    @pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
    def test_wider_padding_changes_no_share(self, loss_type: str):
        wide = torch.nn.functional.pad(self.MASK, (0, 5))
        assert torch.equal(token_shares(wide, loss_type, 4)[:, :4], token_shares(self.MASK, loss_type, 4))


class TestKL:
    CASES = ((0.5, 0.5, 0.0), (0.5, 0.25, 0.5 + math.log(2) - 1), (0.25, 0.5, 2 - math.log(2) - 1))

    @pytest.mark.parametrize(("policy", "reference", "expected"), CASES)
    def test_a_token_s_estimate_is_the_ratio_less_its_logarithm_less_one(self, policy, reference, expected):
        assert float(kl_estimate(tensor(policy).log(), tensor(reference).log())) == pytest.approx(expected)

    def test_it_is_never_negative_and_on_average_over_the_policy_s_tokens_the_divergence(self):
        policy, reference = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
        estimates = kl_estimate(policy, reference)
        divergence = (policy.exp() * (policy - reference)).sum()
        assert estimates.min() >= 0
        torch.testing.assert_close((policy.exp() * estimates).sum(), divergence)


class TestLoss:
    @pytest.mark.parametrize(("ratio", "advantage", "gain", "gain_high", "cut_off"), CLIPPING)
    def test_the_gain_is_clipped_where_it_would_grow(self, ratio, advantage, gain, gain_high, cut_off):
        logps, old = tensor(-1.0)[None] + math.log(ratio), tensor(-1.0)[None]
        for high, expected in ((None, gain), (0.28, gain_high)):
            loss = grpo_loss(logps, old, None, tensor(advantage), tensor(0.25)[None], clip_eps=0.2, clip_eps_high=high)
            assert float(loss) == pytest.approx(-0.25 * expected)

    @pytest.mark.parametrize(("ratio", "advantage", "gain", "gain_high", "cut_off"), CLIPPING)
    def test_a_token_counts_as_clipped_when_its_gradient_is_cut_off(self, ratio, advantage, gain, gain_high, cut_off):
        old = tensor(-1.0)[None]
        for high in (None, 0.28):
            logps = (old + math.log(ratio)).requires_grad_()
            grpo_loss(
                logps, old, None, tensor(advantage), tensor(1.0)[None], clip_eps=0.2, clip_eps_high=high
            ).backward()
            cut = (high is None) if cut_off is None else cut_off
            expected = 0.0 if cut else -advantage * ratio
            assert float(logps.grad) == pytest.approx(expected)
            mask = torch.ones(1, 1, dtype=torch.bool)
            share = clip_fraction(logps.detach(), old, tensor(advantage), mask, clip_eps=0.2, clip_eps_high=high)
            assert share == float(cut)

    def test_the_clipped_share_is_of_the_tokens_in_the_mask(self):
        old, mask = torch.zeros(2, 3), torch.tensor([[True, True, True], [True, False, False]])
        logps = torch.tensor([[0.5, 0.5, 0.0], [-0.5, -0.5, -0.5]])  # ratios 1.65, 1.65, 1; 0.61
        assert clip_fraction(logps, old, torch.tensor([1.0, -1.0]), mask, clip_eps=0.2, clip_eps_high=None) == 0.75
        assert clip_fraction(logps, old, torch.tensor([1.0, 1.0]), mask, clip_eps=0.2, clip_eps_high=None) == 0.5
        assert clip_fraction(logps, old, torch.ones(2), mask & False, clip_eps=0.2, clip_eps_high=None) == 0.0

    def test_a_row_of_two_tokens_by_hand(self):
        # Ratios 1 and 1.5, advantage 2: gains 2 and 2.4. k3: 0 and 1/2 + ln 2 - 1.
        old = tensor(0.5, 0.4).log()[None]
        logps, ref = tensor(0.5, 0.6).log()[None], tensor(0.5, 0.3).log()[None]
        shares = tensor(0.3, 0.7)[None]
        loss = grpo_loss(logps, old, ref, tensor(2.0), shares, clip_eps=0.2, kl_coef=0.1)
        assert float(loss) == pytest.approx(-0.3 * 2 + 0.7 * (-2.4 + 0.1 * (math.log(2) - 0.5)))
        without = grpo_loss(logps, old, None, tensor(2.0), shares, clip_eps=0.2, kl_coef=0.1)
        assert float(without) == pytest.approx(-0.3 * 2 - 0.7 * 2.4)

    def test_at_the_old_policy_the_gradient_is_advantage_times_weight_and_that_of_the_divergence(self):
        given = random_inputs(0) | {"old_logps": random_inputs(0)["logps"].detach()}
        grpo_loss(**given, clip_eps=0.2, kl_coef=0.1).backward()
        gap = given["ref_logps"] - given["logps"].detach()
        expected = given["shares"] * (-given["advantages"] + 0.1 * (1 - gap.exp()))
        torch.testing.assert_close(given["logps"].grad, expected)

    @pytest.mark.parametrize("kl_coef", [0.0, 0.3])
    @pytest.mark.parametrize("clip_eps_high", [None, 0.28, 0.5])
    def test_the_gradient_agrees_with_finite_differences(self, clip_eps_high: float | None, kl_coef: float):
        given = random_inputs(1)
        logps = given.pop("logps")
        settings = {"clip_eps": 0.2, "clip_eps_high": clip_eps_high, "kl_coef": kl_coef}
        assert torch.autograd.gradcheck(lambda values: grpo_loss(values, **given, **settings), logps)

    def test_the_losses_of_any_parts_add_up_to_that_of_the_whole(self):
        given = random_inputs(2)
        whole = grpo_loss(**given, clip_eps=0.2, kl_coef=0.1)
        parts = [
            grpo_loss(**{name: value[rows] for name, value in given.items()}, clip_eps=0.2, kl_coef=0.1)
            for rows in ([0], [5, 2], [1, 3, 4])
        ]
        torch.testing.assert_close(sum(parts), whole)

    def test_zero_advantages_give_exactly_no_gradient_from_the_policy_term(self):
        given = random_inputs(3) | {"ref_logps": None, "advantages": torch.zeros(6, 1, dtype=torch.float64)}
        grpo_loss(**given, clip_eps=0.2).backward()
        assert given["logps"].grad.eq(0).all()

    def test_a_token_without_weight_has_exactly_no_gradient(self):
        given = random_inputs(4)
        given["shares"][:, 3:] = 0
        grpo_loss(**given, clip_eps=0.2, kl_coef=0.1).backward()
        assert given["logps"].grad[:, 3:].eq(0).all() and given["logps"].grad[:, :3].ne(0).any()

    def test_no_argument_is_changed(self):
        given = random_inputs(5)
        before = {name: value.detach().clone() for name, value in given.items()}
        grpo_loss(**given, clip_eps=0.2, kl_coef=0.1)
        assert all(torch.equal(value, before[name]) for name, value in given.items())
