"""What a query sees: masks by hand, one for all layers; what prompts begin with, run once; a kernel that is wrong."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import src.engine.kv_cache
from src.engine.kv_cache import attention_masks, encode_prefix, left_pad
from src.engine.logprobs import Batch, accumulate_gradients, batch_logps
from src.engine.sampling import Sampler
from tests.helpers import (
    ARCHITECTURES,
    assert_same,
    gradients,
    make_batch,
    plain_logps,
    plain_sample,
    random_texts,
    tiny_model,
)
from tests.test_logprobs import (
    COMPLETIONS,
    PROMPTS,
    NothingAddedByIndex,
    all_rows,
    fast_gradients,
    padded,
    token_shares,
    weighted,
)
from tests.test_sampling import END_IDS, draw, texts_of

SHARED = random_texts((20,), 7)[0]
# Of the width of 51, these leave the shared 20 columns whole, in part, and not at all behind their padding.
LIKE_CHATS = [SHARED + rest for rest in random_texts((31, 14, 3), 8)]


class TestMasks:
    def test_a_query_sees_its_row_up_to_itself_within_the_window_and_padding_sees_itself(self):
        first, columns = torch.tensor([[0, 0], [1, 2], [3, 4]]), torch.tensor([3, 4])
        config = SimpleNamespace(sliding_window=2, layer_types=["full_attention", "sliding_attention"])
        masks = attention_masks(config, first, columns, 5, torch.float32)
        full = [["11110", "11111"], ["01110", "00111"], ["00010", "00001"]]
        sliding = [["00110", "00011"], ["00110", "00011"], ["00010", "00001"]]
        for kind, expected in (("full_attention", full), ("sliding_attention", sliding)):
            shown = [["".join(map(str, row)) for row in rows[0]] for rows in (masks[kind] == 0).int().tolist()]
            assert shown == expected and masks[kind].shape == (3, 1, 2, 5)
        alone = attention_masks(SimpleNamespace(), first, columns, 5, torch.float32)
        assert torch.equal(alone, masks["full_attention"])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_all_layers_share_one_additive_mask_whose_rows_are_aligned(self, dtype: torch.dtype, monkeypatch):
        attention, seen = nn.functional.scaled_dot_product_attention, []

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            seen.append(kwargs["attn_mask"])
            return attention(*args, **kwargs)

        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
        fast_gradients(tiny_model("qwen2").to(dtype), make_batch(PROMPTS, COMPLETIONS))
        assert [mask.shape for mask in seen] == [(3, 1, 10, 10)] * 2 + [(6, 1, 12, 22)] * 2
        assert seen[0] is seen[1] and seen[2] is seen[3]
        assert all(mask.dtype == dtype and mask.stride(-1) == 1 and mask.stride(-2) % 8 == 0 for mask in seen)


class TestSharedBeginnings:
    @pytest.fixture(autouse=True)
    def always(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(src.engine.kv_cache, "WORTH_SHARING", {"cpu": 1, "cuda": 1})

    def shapes(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Of the ids in each call of the model that it takes to encode these prompts."""
        model, shapes = tiny_model(), []
        hook = lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape))  # noqa: E731
        model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
        prefix = encode_prefix(model, *left_pad(prompts, 0, "cpu"))
        assert {tensor.shape for tensor in prefix} == {(len(prompts), 2, max(map(len, prompts)) - 1, 8)}
        return shapes

    @pytest.mark.parametrize("token_budget", [60, 110, 10**6])  # a prompt at a time, two, all three
    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_scores_and_gradients_are_those_of_one_text_at_a_time(self, kind: str, token_budget: int) -> None:
        model, batch, weights = tiny_model(kind), make_batch(LIKE_CHATS, COMPLETIONS), token_shares(6, 12)
        plain = [plain_logps(model, LIKE_CHATS[b // 2], text) for b, text in enumerate(COMPLETIONS)]
        sum((w[: len(lp)] * lp.exp() * lp).sum() for w, lp in zip(weights, plain, strict=True)).backward()
        expected, found = gradients(model), batch_logps(model, batch, all_rows(batch), 1.0, token_budget)
        torch.testing.assert_close(found, padded([lp.detach() for lp in plain], 12), atol=1e-4, rtol=0)
        model.zero_grad()
        loss, budget = weighted(weights), {"temperature": 1.0, "token_budget": token_budget}
        with NothingAddedByIndex():
            accumulate_gradients(model, batch, all_rows(batch), loss, **budget)
        assert_same(gradients(model), expected)

    def test_gradients_of_copies_are_added_up_in_fp32(self) -> None:
        # In bf16, adding 1 to 256 is adding nothing.
        once = torch.ones(1, 1, 4, 1, dtype=torch.bfloat16, requires_grad=True)
        copies = src.engine.kv_cache._behind_padding(once, [0] * 300 + [1, 1, 9])
        assert copies.dtype == torch.bfloat16 and copies[-2:].flatten().tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
        copies.backward(torch.ones_like(copies))
        assert once.grad.flatten().tolist() == [302, 302, 302, 300]

    @pytest.mark.parametrize("rows", [2, 64])  # a prompt enters beside a running row; all begin at once
    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_samples_are_those_of_one_text_at_a_time(self, kind: str, rows: int) -> None:
        model, uniforms = tiny_model(kind), draw(6, 12, seed=3)
        given = {"group_size": 2, "max_new_tokens": 12, "temperature": 1.0, "uniforms": uniforms}
        out = Sampler(model, END_IDS, 1, rows).generate(LIKE_CHATS, **given)
        plain = [plain_sample(model, LIKE_CHATS[b // 2], u, 1.0, END_IDS) for b, u in enumerate(uniforms.tolist())]
        assert texts_of(out) == plain

    @pytest.mark.parametrize(
        ("prompts", "expected"),
        [
            (LIKE_CHATS, [(1, 20), (3, 30)]),
            ([SHARED, SHARED], [(1, 18), (2, 1)]),  # the last two tokens run in each row
            ([SHARED, SHARED[:5]], [(1, 5), (2, 14)]),  # one is the other's beginning
            ([SHARED, SHARED[1:]], [(2, 19)]),
            ([SHARED], [(1, 19)]),
            ([SHARED[:2], SHARED[:2]], [(2, 1)]),
        ],
    )
    def test_what_all_begin_with_runs_once(self, prompts: list[list[int]], expected: list[tuple[int, int]]) -> None:
        assert self.shapes(prompts) == expected

    def test_where_that_saves_few_tokens_each_prompt_runs_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for worth, expected in ((40, [(1, 20), (3, 30)]), (41, [(3, 50)])):  # 20 of each but the first
            monkeypatch.setitem(src.engine.kv_cache.WORTH_SHARING, "cpu", worth)
            assert self.shapes(LIKE_CHATS) == expected


@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_half_precision_gradients_are_finite_where_keys_are_64_mod_128_long(device: str, shift: float):
    # cuDNN's attention gives NaN there when the scores of a row are very low. The slowest pair of the rotary embedding
    # hardly turns, so that biases of opposite sign there lower all scores alike, which changes nothing else.
    prompts, completions = random_texts((129, 101), 3), random_texts((64, 40, 64, 7), 4)  # 128 + 64 keys
    batch, found = make_batch(prompts, completions), {}
    for where, dtype in (("cpu", torch.float32), (device, torch.bfloat16)):
        model = tiny_model("qwen2", hidden_size=128, num_attention_heads=2, num_key_value_heads=1)  # heads of 64
        attention = model.model.layers[0].self_attn
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.3)
            for projection, sign in ((attention.q_proj, 1), (attention.k_proj, -1)):
                projection.bias.view(-1, 64)[:, [31, 63]] = sign * shift
        model = model.to(where, dtype)
        there = Batch(*(tensor.to(where) for tensor in vars(batch).values()))
        loss = lambda rows, columns, logps: -logps.sum() / 175  # noqa: E731
        accumulate_gradients(model, there, all_rows(batch).to(where), loss, temperature=1.0, token_budget=10**6)
        found[dtype] = torch.cat([p.grad.float().flatten().cpu() for p in model.parameters()])
    assert found[torch.bfloat16].isfinite().all()
    assert nn.functional.cosine_similarity(*found.values(), dim=0) > 0.9
