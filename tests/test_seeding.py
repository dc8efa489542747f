"""Random numbers are a function of seed and place; a batch is a function of the step."""

from collections import Counter

import pytest
import torch

from src.seeding import batch_indices, generator

PLACES = (
    (0, "sampling", 1),
    (1, "sampling", 1),
    (0, "sampling", 2),
    (0, "order", 1),
    (0, "sampling"),
    (0, "sampling", 1, 0),
)


def numbers(*place: str | int) -> list[float]:
    return torch.rand(4, generator=generator(*place)).tolist()


class TestGenerator:
    def test_the_same_place_gives_the_same_numbers(self):
        assert all(numbers(*place) == numbers(*place) for place in PLACES)

    def test_another_place_or_seed_gives_other_numbers(self):
        assert len({tuple(numbers(*place)) for place in PLACES}) == len(PLACES)

    def test_the_numbers_stay_what_they_are_across_versions_of_the_code(self):
        # Resumed runs rely on it. The first 8 bytes of the SHA-256 of "7/sampling/3", little-endian, without the sign.
        assert generator(7, "sampling", 3).initial_seed() == 0x66151CCCD97AC519

    def test_the_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        numbers(0, "sampling", 1)
        batch_indices(10, 2, 3, seed=0, name="order")
        assert torch.equal(torch.get_rng_state(), before)


class TestBatchIndices:
    @pytest.mark.parametrize(("rows", "size"), [(12, 3), (10, 3), (5, 5), (7, 1)])
    def test_every_full_batch_of_an_epoch_has_new_examples(self, rows: int, size: int):
        steps = rows // size
        for epoch in range(3):
            batches = [batch_indices(rows, size, epoch * steps + i, 0, "order") for i in range(steps)]
            seen = Counter(index for batch in batches for index in batch)
            assert all(len(batch) == size for batch in batches)
            assert set(seen.values()) == {1} and set(seen) <= set(range(rows))
            assert len(seen) == rows - rows % size  # all of them, or all but those of the incomplete batch

    def test_over_the_epochs_the_incomplete_batch_leaves_out_nobody_for_good(self):
        assert {i for step in range(30) for i in batch_indices(10, 3, step, 0, "order")} == set(range(10))

    def test_epochs_seeds_and_names_have_orders_of_their_own(self):
        orders = {
            tuple(batch_indices(50, 50, step, seed, name))
            for step in (0, 1, 2)
            for seed in (0, 1)
            for name in ("cold start", "GRPO")
        }
        assert len(orders) == 12

    def test_a_batch_is_a_function_of_the_step_alone(self):
        straight = [batch_indices(10, 3, step, 5, "order") for step in range(9)]
        assert [batch_indices(10, 3, step, 5, "order") for step in reversed(range(9))] == straight[::-1]

    def test_too_few_examples_for_a_batch_are_refused(self):
        with pytest.raises(ValueError, match="3 examples do not fill one batch of 4"):
            batch_indices(3, 4, 0, 0, "order")
