"""One optimizer step after another, whatever happens: a gradient that is not finite, a memory that is full."""

import logging
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.engine.optim import MasterAdamW
from src.engine.processes import Processes
from src.errors import UserError, memory_is_full

log = logging.getLogger(__name__)

MAX_SKIPS = 5  # updates in a row without a finite loss and gradient before the run stops


def peak_memory(device: torch.device) -> float:
    """The most that this process has held, in GB (10^9 bytes): on a card since the last call, else so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Learner:
    """What the cold start and GRPO share: the optimizer, and what keeps a bad step from spoiling the run."""

    def __init__(
        self, model: PreTrainedModel, max_grad_norm: float, token_budget: int, processes: Processes | None = None
    ):
        self.model, self.device, self.max_grad_norm = model, model.device, max_grad_norm
        self.optimizer = MasterAdamW(model)
        self.processes = processes or Processes()
        self.token_budget = token_budget
        self.skipped_steps = self.skips_in_a_row = 0
        self.seconds: dict[str, float] = {}  # of the parts of the step

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start, waited = time.perf_counter(), self.processes.waited
        yield
        torch.get_device_module(self.device).synchronize()
        waited = self.processes.waited - waited
        for part, seconds in ((name, time.perf_counter() - start - waited), ("waiting", waited)):
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def _apply(self, lr: float, loss: float) -> float:
        """One optimizer step, or a skipped and counted one when there is no gradient, or no finite one (or loss).

        Returns the gradient norm, 0 for a skipped step.

        loss: of all processes, so that all do the same.
        """
        norm: float | None = math.nan
        if math.isfinite(loss):
            self.processes.add_gradients(self.optimizer.master.values())
            norm = self.optimizer.step(lr, self.max_grad_norm)
        else:
            self.optimizer.zero_grad()
        if norm is None or not math.isfinite(norm):
            self.skipped_steps += 1
        self.skips_in_a_row = self.skips_in_a_row + 1 if norm is not None and not math.isfinite(norm) else 0
        if self.skips_in_a_row >= MAX_SKIPS:
            what = f"The loss or the gradient was not finite in {MAX_SKIPS} updates in a row"
            advice = "resume from an earlier checkpoint with a lower --learning_rate and --allow_changes true"
            raise UserError(f"{what}: {advice}.")
        return norm if norm and math.isfinite(norm) else 0.0

    def _added_up(self, work: Callable[[int], Sequence[Tensor]]) -> list[Tensor]:
        """What work(token_budget) returns, summed over processes; afterwards all have the smallest of their budgets.

        Each attempt begins without a gradient. When the memory is full, the budget is halved for good, and the
        work done again.
        """
        done: list[Tensor] = []

        def attempt() -> int:
            while True:
                self.optimizer.zero_grad()
                try:
                    done.extend(work(self.token_budget))
                    return self.token_budget
                except RuntimeError as error:
                    if not memory_is_full(error):
                        raise
                # What comes now comes after the error, which holds on to the attempt's tensors.
                if self.token_budget <= 64:
                    flags = "--group_size, --prompts_per_step, --cold_start_batch_size or --max_completion_tokens"
                    raise UserError(f"The memory is full even with the smallest micro-batch: lower {flags}.")
                self.token_budget //= 2
                self.optimizer.zero_grad()
                torch.cuda.empty_cache()
                log.warning("out of memory: going on with micro-batches of %d tokens", self.token_budget)

        self.token_budget = min(self.processes.gather(attempt))
        return self.processes.sum(*done)
