"""Log-probabilities and gradients over padded batches with shared prompts equal those of one text at a time."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import src.engine.logprobs
from src.engine.logprobs import Batch, TokenLoss, accumulate_gradients, batch_logps
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


# Rows and lengths once; for prompts that run together once their numbers, ids, mask, rows and these rows' tokens, and
# what they begin with.
@pytest.mark.parametrize(("shared", "expected"), [(0, {10**6: 7, 33: 7, 14: 17}), (1, {10**6: 8, 33: 13, 14: 17})])
def test_no_micro_batch_waits_for_the_gpu(
    shared: int, expected: dict[int, int], gpu: PretendGPU | None, monkeypatch: pytest.MonkeyPatch
):
    if gpu is None:
        pytest.skip("only the stand-in counts")
    monkeypatch.setitem(src.engine.kv_cache.WORTH_SHARING, "cuda", 1)
    prompts = [[*[7] * shared, *prompt] for prompt in PROMPTS]
    batch = Batch(*(tensor.cuda() for tensor in vars(make_batch(prompts, COMPLETIONS)).values()))
    model, rows, waits = tiny_model("qwen2").cuda().bfloat16(), torch.arange(6, device="cuda"), {}
    settings = {"loss": lambda rows, columns, logps: logps.sum(), "temperature": 1.0}
    for budget in expected:  # all at once; in two micro-batches; a prompt after the other
        before = gpu.waits
        accumulate_gradients(model, batch, rows, **settings, token_budget=budget)
        learning, before = gpu.waits - before, gpu.waits
        batch_logps(model, batch, rows, 1.0, budget)
        waits[budget] = (learning, gpu.waits - before)
    assert waits == {budget: (count, count) for budget, count in expected.items()}


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
