"""Random numbers that depend on the seed and on the place where they are used, on nothing before it.

Each use (data order, sampling, ...) of each step has a generator of its own, made from the seed, a name and the step.
There is no generator state to carry along: step 500 draws the same numbers in a resumed run as in an unbroken one.
"""

import hashlib

import torch


def generator(seed: int, *place: str | int) -> torch.Generator:
    """A CPU generator that is a function of its arguments only."""
    digest = hashlib.sha256("/".join(map(str, (seed, *place))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


def batch_indices(rows: int, batch_size: int, step: int, seed: int, name: str) -> list[int]:
    """Which of `rows` examples step `step` (from 0) trains on: a new order every epoch, without an incomplete batch.

    Raises:
        ValueError: there are fewer rows than one batch takes.
    """
    if rows < batch_size:
        raise ValueError(f"{rows} examples do not fill one batch of {batch_size}")
    epoch, position = divmod(step, rows // batch_size)
    order = torch.randperm(rows, generator=generator(seed, name, epoch))
    return order[position * batch_size : (position + 1) * batch_size].tolist()
