"""The head: log-probabilities and their gradient chunk by chunk, never all logits at once."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import src.engine.logprobs
from src.engine.logprobs import HeadLoss, token_logps
from tests.helpers import assert_same, make_batch, tiny_model
from tests.test_logprobs import COMPLETIONS, PROMPTS, fast_gradients


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


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
