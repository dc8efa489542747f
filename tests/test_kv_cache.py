"""What a query sees: the masks by hand, one for all layers; and a key length at which a kernel is wrong."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.engine.kv_cache import attention_masks
from src.engine.logprobs import Batch, accumulate_gradients
from tests.helpers import make_batch, random_texts, tiny_model
from tests.test_logprobs import COMPLETIONS, PROMPTS, all_rows, fast_gradients


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
