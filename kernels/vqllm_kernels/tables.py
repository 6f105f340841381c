"""Equal entries of a stored table."""

import torch
from torch import Tensor

FINITE = 63487
"""Different finite numbers in float16."""


def repeated(entries: Tensor) -> Tensor:
    """Which entries equal one before them in their own table, bool [.., K] for [.., K, E]."""
    num, size = entries.shape[-2:]
    # In one call for all tables: each entry with the number of its table before it. The sum turns
    # −0, which equals 0, into 0.
    rows = entries.reshape(-1, size).double() + 0.0
    place = torch.arange(len(rows), device=rows.device)
    rows = torch.cat([(place // num)[:, None].double(), rows], 1)
    _, kind = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full_like(kind, len(kind)).scatter_reduce(0, kind, place, "amin")
    return (first[kind] != place).view(entries.shape[:-1])


def equal_entries(name: str, entries: Tensor) -> str | None:
    """What is wrong with a table in float16 or several, [.., K, E], if entries of one are equal."""
    if entries.shape[-1] == 1 and entries.shape[-2] > FINITE:
        return None  # they cannot all differ
    num = int(repeated(entries).sum())
    if num:
        return f"{num} of the {entries[..., 0].numel()} entries of {name} equal an earlier one"
    return None
