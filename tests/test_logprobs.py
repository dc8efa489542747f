"""Log-probabilities and gradients over padded batches with shared prompts equal those of one text at a time."""

import os
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import src.engine.logprobs
from src.engine.kv_cache import attention_masks
from src.engine.logprobs import Batch, HeadLoss, TokenLoss, accumulate_gradients, batch_logps, token_logps
from src.engine.sampling import Sampler
from tests.helpers import ARCHITECTURES, assert_same, gradients, make_batch, plain_logps, random_texts, tiny_model
from tests.pretend_gpu import PretendGPU

PROMPTS = random_texts((5, 11, 2), 1)
COMPLETIONS = random_texts((7, 1, 12, 4, 12, 3), 2)  # two a prompt, none as long as its neighbour
BUDGETS = (1, 7, 30, 10**6)


def all_rows(batch: Batch) -> Tensor:
    return torch.arange(len(batch.completion_ids))


def padded(rows: Sequence[Tensor], width: int) -> Tensor:
    return torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])


def plain_batch_logps(model: PreTrainedModel, temperature: float) -> Tensor:
    with torch.no_grad():
        rows = [plain_logps(model, PROMPTS[b // 2], text, temperature) for b, text in enumerate(COMPLETIONS)]
    return padded(rows, 12)


def token_shares(rows: int, tokens: int) -> Tensor:
    """A weight for every token, none like another, so that a token in the wrong place shows."""
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(9)) - 0.3


def weighted(weights: Tensor) -> TokenLoss:
    """A loss that is not linear in the log-probabilities and is a sum over tokens."""
    return lambda rows, columns, logps: (weights[rows, columns] * logps.exp() * logps).sum()


def plain_gradients(kind: str, temperature: float) -> dict[str, Tensor]:
    """Gradients of the `weighted` loss from one pass a text."""
    model, weights = tiny_model(kind), token_shares(6, 12)
    for b, text in enumerate(COMPLETIONS):
        logps = plain_logps(model, PROMPTS[b // 2], text, temperature)
        (weights[b, : len(text)] * logps.exp() * logps).sum().backward()
    return gradients(model)


def fast_gradients(
    model: PreTrainedModel, batch: Batch, token_budget: int = 10**6, temperature: float = 1.0
) -> tuple[dict[str, Tensor], Tensor]:
    model.zero_grad()
    loss = weighted(token_shares(6, 12))
    logps, total = accumulate_gradients(
        model, batch, all_rows(batch), loss, temperature=temperature, token_budget=token_budget
    )
    rows, columns = batch.completion_mask.nonzero(as_tuple=True)
    torch.testing.assert_close(total, loss(rows, columns, logps[rows, columns]))
    return gradients(model), logps


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


class NothingAddedByIndex(TorchDispatchMode):
    """Refuses additions at indices that may come twice, for which threads race."""

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        assert "index_put" not in func.name() or True not in args[3:4], func.name()
        return func(*args, **(kwargs or {}))


class TestLogProbabilities:
    @pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_a_padded_batch_scores_like_one_text_at_a_time(self, kind: str, temperature: float):
        model, batch = tiny_model(kind), make_batch(PROMPTS, COMPLETIONS)
        logps = batch_logps(model, batch, all_rows(batch), temperature, 10**6)
        torch.testing.assert_close(logps, plain_batch_logps(model, temperature), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("token_budget", BUDGETS)
    def test_any_split_into_micro_batches_scores_the_same(self, token_budget: int):
        model, batch = tiny_model("gemma3_text"), make_batch(PROMPTS, COMPLETIONS)
        logps = batch_logps(model, batch, all_rows(batch), 1.3, token_budget)
        torch.testing.assert_close(logps, plain_batch_logps(model, 1.3), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("pad_id", [0, 1, 96])
    def test_the_padding_token_does_not_matter_and_may_be_one_of_the_text(self, pad_id: int):
        model = tiny_model("qwen2")
        texts = [[*text[:-1], 1] for text in COMPLETIONS]  # each ended by token 1
        expected = padded([plain_logps(model, PROMPTS[b // 2], text) for b, text in enumerate(texts)], 12)
        batch = make_batch(PROMPTS, texts, pad_id)
        torch.testing.assert_close(batch_logps(model, batch, all_rows(batch), 1.0, 10**6), expected, atol=1e-4, rtol=0)

    def test_rows_that_are_not_asked_for_are_zero_and_the_others_do_not_notice(self):
        model, batch, rows = tiny_model("mistral"), make_batch(PROMPTS, COMPLETIONS), torch.tensor([4, 0])
        logps = batch_logps(model, batch, rows, 1.0, 10**6)
        expected = torch.zeros(6, 12)
        expected[rows] = plain_batch_logps(model, 1.0)[rows]
        torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)

    def test_no_rows_give_no_log_probabilities_and_no_gradient(self):
        model, batch, none = tiny_model(), make_batch(PROMPTS, COMPLETIONS), torch.tensor([], dtype=torch.long)
        assert not batch_logps(model, batch, none, 1.0, 10).any()
        loss = weighted(token_shares(6, 12))
        logps, total = accumulate_gradients(model, batch, none, loss, temperature=1.0, token_budget=10)
        assert not logps.any() and total == 0
        assert gradients(model) == {}

    def test_scoring_alone_keeps_no_graph(self):
        model, batch = tiny_model(), make_batch(PROMPTS, COMPLETIONS)
        assert not batch_logps(model, batch, all_rows(batch), 1.0, 7).requires_grad

    @pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_the_learner_scores_a_sample_as_the_sampler_did(self, kind: str, temperature: float):
        model, end_ids = tiny_model(kind), [1, 2, 5, 8, 13, 21, 34, 55, 89]
        uniforms = torch.rand(12, 10, generator=torch.Generator().manual_seed(3))
        out = Sampler(model, end_ids, 1, rows=5).generate(
            PROMPTS, group_size=4, max_new_tokens=10, temperature=temperature, uniforms=uniforms
        )
        prompts = make_batch(PROMPTS, PROMPTS)
        batch = Batch(prompts.prompt_ids, prompts.prompt_mask, out.ids, out.mask)
        logps = batch_logps(model, batch, all_rows(batch), temperature, 10**6)
        assert out.mask.sum(-1).min() < 10
        torch.testing.assert_close(logps, out.logps, atol=1e-4, rtol=0)


class TestGradients:
    @pytest.mark.parametrize("temperature", [0.7, 1.3])
    @pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3_text"])  # llama's head is tied to its embedding
    def test_a_padded_batch_has_the_gradient_of_one_text_at_a_time(self, kind: str, temperature: float):
        actual, logps = fast_gradients(tiny_model(kind), make_batch(PROMPTS, COMPLETIONS), temperature=temperature)
        assert_same(actual, plain_gradients(kind, temperature))
        torch.testing.assert_close(logps, plain_batch_logps(tiny_model(kind), temperature), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
    def test_any_split_into_micro_batches_has_the_same_gradient(self, kind: str):
        model, batch = tiny_model(kind), make_batch(PROMPTS, COMPLETIONS)
        expected, logps = fast_gradients(model, batch)
        for token_budget in BUDGETS:
            split, split_logps = fast_gradients(model, batch, token_budget)
            assert_same(split, expected)
            torch.testing.assert_close(split_logps, logps, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("token_budget", [7, 10**6])
    def test_the_order_of_the_rows_does_not_matter(self, token_budget: int):
        model, batch, loss = tiny_model("qwen2"), make_batch(PROMPTS, COMPLETIONS), weighted(token_shares(6, 12))
        expected, logps = fast_gradients(model, batch, token_budget)
        model.zero_grad()
        order = torch.tensor([3, 5, 0, 4, 1, 2])
        again, _ = accumulate_gradients(model, batch, order, loss, temperature=1.0, token_budget=token_budget)
        assert_same(gradients(model), expected)
        torch.testing.assert_close(again, logps, atol=1e-5, rtol=0)

    @pytest.mark.skipif(os.cpu_count() == 1, reason="threads that share one core do not race")
    def test_threads_do_not_race_for_the_gradient_of_shared_prompts(self):
        batch = make_batch(random_texts([60] * 4, 1), random_texts([30 - b * 7 % 11 for b in range(64)], 2))
        model, loss = tiny_model("qwen2"), weighted(torch.rand(64, 30, generator=torch.Generator().manual_seed(9)))
        with NothingAddedByIndex():
            accumulate_gradients(model, batch, all_rows(batch), loss, temperature=1.0, token_budget=4096)
        found = []
        torch.set_num_threads(2)
        try:
            for _ in range(6):
                model.zero_grad()
                accumulate_gradients(model, batch, all_rows(batch), loss, temperature=1.0, token_budget=4096)
                found.append(gradients(model))
        finally:
            torch.set_num_threads(1)
        for again in found[1:]:
            torch.testing.assert_close(again, found[0], atol=0, rtol=0)

    def test_gradients_add_up_over_calls(self):
        model, batch, loss = tiny_model("qwen2"), make_batch(PROMPTS, COMPLETIONS), weighted(token_shares(6, 12))
        expected, _ = fast_gradients(model, batch)
        model.zero_grad()
        for rows in (torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])):
            accumulate_gradients(model, batch, rows, loss, temperature=1.0, token_budget=20)
        assert_same(gradients(model), expected)

    def test_what_stands_in_the_padding_has_no_influence(self):
        model, batch = tiny_model("phi"), make_batch(PROMPTS, COMPLETIONS)
        other = torch.randint(0, 97, (6, 12), generator=torch.Generator().manual_seed(4))
        garbage = Batch(
            torch.where(batch.prompt_mask, batch.prompt_ids, other[:3, :11]),
            batch.prompt_mask,
            torch.where(batch.completion_mask, batch.completion_ids, other),
            batch.completion_mask,
        )
        expected, logps = fast_gradients(model, batch)
        actual, actual_logps = fast_gradients(model, garbage)
        assert_same(actual, expected, tolerance=1e-5)
        torch.testing.assert_close(actual_logps, logps, atol=1e-5, rtol=0)

    def test_every_prompt_runs_through_the_model_once(self):
        model, batch, shapes = tiny_model(), make_batch(PROMPTS, COMPLETIONS), []
        hook = lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape))  # noqa: E731
        model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
        fast_gradients(model, batch)
        assert shapes == [(3, 10), (6, 12)]  # all prompts but their last token, then all completions
        shapes.clear()
        fast_gradients(model, batch, token_budget=24)
        # 24 // 11 prompts at a time; of the first two prompts' rows the long ones, 12 a row, come first.
        assert shapes == [(2, 10), (2, 12), (2, 4), (1, 10), (2, 12)]

    def test_a_micro_batch_is_no_wider_than_its_longest_completion_and_within_the_budget(self):
        model, batch, sizes, longest = tiny_model(), make_batch(PROMPTS, COMPLETIONS), [], []
        loss = weighted(token_shares(6, 12))
        hook = lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape))  # noqa: E731
        model.base_model.register_forward_pre_hook(hook, with_kwargs=True)

        def noting(rows: Tensor, columns: Tensor, logps: Tensor) -> Tensor:
            longest.append(batch.completion_mask[rows].sum(-1).max())
            return loss(rows, columns, logps)

        accumulate_gradients(model, batch, all_rows(batch), noting, temperature=1.0, token_budget=14)
        sizes = [size for size in sizes if size[1] != 10]  # the prompts'
        assert [width for _, width in sizes] == longest
        assert max(rows * width for rows, width in sizes) <= 14

    def test_short_rows_get_a_micro_batch_of_their_own_where_that_saves_more_padding_than_it_costs(self, monkeypatch):
        # Longest first 12, 12, 7, 4, 3, 1. Cut before row i saves (12 - length) * (6 - i): 0, 0, 20, 24, 18, 11.
        model, batch, shapes = tiny_model(), make_batch(PROMPTS, COMPLETIONS), []
        hook = lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape))  # noqa: E731
        model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
        for cost, expected in ((23, [(3, 12), (3, 4)]), (24, [(6, 12)])):
            monkeypatch.setitem(src.engine.logprobs.BATCH_COST, "cpu", cost)
            shapes.clear()
            fast_gradients(model, batch)
            assert shapes[1:] == expected


class TestHead:
    WIDTH, TOKENS, WORDS = 8, 100, 1024

    def inputs(self) -> tuple[nn.Linear, Tensor, Tensor]:
        random = torch.Generator().manual_seed(6)
        head = nn.Linear(self.WIDTH, self.WORDS)
        with torch.no_grad():
            head.weight.normal_(0, 1, generator=random)
            head.bias.normal_(0, 1, generator=random)
        hidden = torch.randn(self.TOKENS, self.WIDTH, generator=random, requires_grad=True)
        return head, hidden, torch.randint(0, self.WORDS, (self.TOKENS,), generator=random)

    @staticmethod
    def plain_sum(part: slice, logps: Tensor) -> Tensor:
        return logps.sum()

    def head_loss(self, head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A loss that is not linear, with another weight for each token."""
        weights = torch.arange(self.TOKENS)
        loss = lambda part, logps: (logps.exp() * weights[part]).sum()  # noqa: E731
        return HeadLoss.apply(hidden, head.weight, head.bias, targets, 0.7, loss)

    @pytest.mark.parametrize("chunk_tokens", [0, 1, 7, 100, 1000])
    def test_chunks_of_any_size_give_the_log_softmax_and_its_gradient(self, chunk_tokens: int, monkeypatch):
        monkeypatch.setitem(src.engine.logprobs.HEAD_CHUNK, "cpu", chunk_tokens * self.WORDS)
        head, hidden, targets = self.inputs()
        loss = self.head_loss(head, hidden, targets)
        loss[0].backward()
        logps = token_logps(head, hidden, targets, 0.7)
        got = {"loss": loss[0].detach(), "logps": loss[1], "scored": logps, "hidden": hidden.grad}
        got |= {"weight": head.weight.grad, "bias": head.bias.grad}
        head, hidden, targets = self.inputs()
        logps = ((hidden @ head.weight.T + head.bias) / 0.7).log_softmax(-1)[torch.arange(self.TOKENS), targets]
        loss = (logps.exp() * torch.arange(self.TOKENS)).sum()
        loss.backward()
        expected = {"loss": loss.detach(), "logps": logps.detach(), "scored": logps.detach(), "hidden": hidden.grad}
        assert_same(got, expected | {"weight": head.weight.grad, "bias": head.bias.grad})

    @pytest.mark.parametrize("frozen", ["weight", "bias"])
    def test_a_frozen_head_gets_no_gradient_and_passes_the_others_on(self, frozen: str):
        head, hidden, targets = self.inputs()
        self.head_loss(head, hidden, targets)[0].backward()
        expected = {name: tensor.grad for name, tensor in (*head.named_parameters(), ("hidden", hidden))}
        head, hidden, targets = self.inputs()
        head.get_parameter(frozen).requires_grad_(False)
        self.head_loss(head, hidden, targets)[0].backward()
        assert head.get_parameter(frozen).grad is None
        got = {name: tensor.grad for name, tensor in (*head.named_parameters(), ("hidden", hidden)) if name != frozen}
        expected.pop(frozen)
        assert_same(got, expected)

    def test_a_half_precision_head_adds_its_gradient_up_in_single_precision(self, monkeypatch):
        # A token a chunk, each with the gradient 1/8 for the sampled word: a sum kept in bf16 would stay at 32.
        monkeypatch.setitem(src.engine.logprobs.HEAD_CHUNK, "cpu", self.WORDS)
        head = nn.Linear(1, self.WORDS, bias=False, dtype=torch.bfloat16)
        nn.init.zeros_(head.weight)
        hidden = torch.full((3000,), 0.125, dtype=torch.bfloat16)[:, None]
        loss, _ = HeadLoss.apply(hidden, head.weight, None, torch.zeros(3000, dtype=torch.long), 1.0, self.plain_sum)
        loss.backward()
        expected = 3000 * 0.125 * (1 - 1 / self.WORDS)
        assert float(head.weight.grad[0]) == pytest.approx(expected, rel=2**-8)
        assert head.weight.grad.dtype == torch.bfloat16

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_chunk_s_logits_are_gone_before_the_next_ones_are_made(self, dtype: torch.dtype, monkeypatch):
        monkeypatch.setitem(src.engine.logprobs.HEAD_CHUNK, "cpu", self.WORDS)
        make, made = src.engine.logprobs._log_probs, []

        def watched(*args: Any) -> Tensor:
            assert all(earlier() is None for earlier in made)
            logits = make(*args)
            made.append(weakref.ref(logits))
            return logits

        monkeypatch.setattr(src.engine.logprobs, "_log_probs", watched)
        head, hidden, targets = self.inputs()
        self.head_loss(head.to(dtype), hidden.detach().to(dtype), targets)
        assert len(made) == self.TOKENS

    def test_half_precision_logits_are_normalised_in_single_precision(self):
        head, hidden, targets = self.inputs()
        head, hidden = head.bfloat16(), hidden.detach().bfloat16()
        logps = token_logps(head, hidden, targets, 0.7)
        expected = (head(hidden).double() / 0.7).log_softmax(-1)[torch.arange(self.TOKENS), targets]
        assert logps.dtype == torch.float32
        torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=0)

    def test_no_graph_holds_a_tensor_of_tokens_times_vocabulary(self):
        head, hidden, targets = self.inputs()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            self.head_loss(head, hidden, targets)[0].backward()
        assert max(saved, default=0) < self.TOKENS * self.WORDS / 10

    def test_no_step_makes_a_tensor_of_tokens_times_vocabulary(self, monkeypatch):
        model = tiny_model("qwen2", vocab_size=1024)  # 39 tokens: 39,936 logits; the largest weight has 32,768 numbers
        batch = make_batch(PROMPTS, COMPLETIONS)
        monkeypatch.setitem(src.engine.logprobs.HEAD_CHUNK, "cpu", 8 * 1024)
        with LargestTensor() as largest:
            fast_gradients(model, batch)
        assert largest.size <= 1024 * 32


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


def test_no_micro_batch_waits_for_the_gpu(gpu: PretendGPU | None):
    if gpu is None:
        pytest.skip("only the stand-in counts")
    batch = Batch(*(tensor.cuda() for tensor in vars(make_batch(PROMPTS, COMPLETIONS)).values()))
    model, rows, waits = tiny_model("qwen2").cuda().bfloat16(), torch.arange(6, device="cuda"), {}
    settings = {"loss": lambda rows, columns, logps: logps.sum(), "temperature": 1.0}
    for budget in (10**6, 33, 14):  # all at once; in two micro-batches; and a prompt after the other
        before = gpu.waits
        accumulate_gradients(model, batch, rows, **settings, token_budget=budget)
        learning, before = gpu.waits - before, gpu.waits
        batch_logps(model, batch, rows, 1.0, budget)
        waits[budget] = (learning, gpu.waits - before)
    # Rows and lengths once; for prompts that run together once their numbers, their rows and these rows' tokens.
    assert waits == {10**6: (5, 5), 33: (5, 5), 14: (11, 11)}


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


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_in_half_precision_on_cuda_the_learner_is_close_to_the_sampler(gpu: PretendGPU | None, temperature: float):
    model = tiny_model("qwen2", num_hidden_layers=4).cuda().bfloat16()
    uniforms = torch.rand(24, 32, generator=torch.Generator().manual_seed(3))
    out = Sampler(model, [1], 1).generate(
        PROMPTS, group_size=8, max_new_tokens=32, temperature=temperature, uniforms=uniforms
    )
    prompts = make_batch(PROMPTS, PROMPTS)
    batch = Batch(prompts.prompt_ids.cuda(), prompts.prompt_mask.cuda(), out.ids, out.mask)
    logps = batch_logps(model, batch, all_rows(batch).cuda(), temperature, 10**6)
    assert (logps - out.logps)[out.mask].abs().mean() < 0.05
