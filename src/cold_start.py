"""The cold start: supervised steps on the XML targets, for a model that has never seen the format.

Stopped early and at a constant rate on purpose: a model that has converged samples the same answer every time, and
GRPO then has nothing to choose from.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.data import Example, encode_prompts, format_target
from src.engine.kv_cache import left_pad
from src.engine.learner import Learner, peak_memory
from src.engine.logprobs import Batch, accumulate_gradients
from src.engine.models import turn_tokens


def target_batch(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], pad_id: int, device: torch.device, prompt: str
) -> Batch:
    """Prompts and their XML targets, each ended as the chat template ends a reply; one completion a prompt."""
    prompts = encode_prompts(tokenizer, [example.question for example in examples], prompt)
    texts = [format_target(example) for example in examples]
    end = turn_tokens(tokenizer)[1] or {tokenizer.eos_token_id}
    targets = [[*ids, *end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    # Padding on the right is padding on the left, read backwards.
    completions = [part.flip(-1) for part in left_pad([ids[::-1] for ids in targets], pad_id, device)]
    return Batch(*left_pad(prompts, pad_id, device), *completions)


def supervised_gradients(model: torch.nn.Module, batch: Batch, rows: Tensor, token_budget: int) -> float:
    """Add the gradient of the mean negative log-likelihood of the completion tokens; returns that mean.

    rows: whose part in both is taken, (n,); those of all parts add up.
    """
    tokens = batch.completion_mask.sum()

    def loss(rows: Tensor, columns: Tensor, logps: Tensor) -> Tensor:
        return -logps.sum() / tokens

    _, total = accumulate_gradients(model, batch, rows, loss, temperature=1.0, token_budget=token_budget)
    return float(total)


class ColdStart(Learner):
    """Trains `model` in place on batches of targets."""

    def step(self, batch: Batch, lr: float) -> dict[str, float]:
        """One supervised step. Returns its metrics."""
        rows = self.processes.rows(torch.arange(len(batch.completion_ids), device=self.device), 1)

        def work(budget: int) -> list[Tensor]:
            return [torch.tensor(supervised_gradients(self.model, batch, rows, budget), dtype=torch.float64)]

        loss = float(self._added_up(work)[0])
        metrics = {"loss": loss, "grad_norm": self._apply(lr, loss), "lr": lr}
        return metrics | {"skipped_steps": float(self.skipped_steps), "peak_memory": peak_memory(self.device)}
