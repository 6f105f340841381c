"""Tables whose entries all differ, which readers require."""

import torch
from torch import Tensor

from vqllm_kernels.tables import repeated

_POSITIVE = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
"""All finite numbers from 0 up, ascending."""


def distinct(entries: Tensor) -> Tensor:
    """Tables in float16 with other entries in place of those that equal an earlier one.

    A matrix with fewer distinct tiles than entries leaves some entries without a tile. They get a
    first element beyond those of all others, and 0 elsewhere: so they are far from every tile and
    take no place in a search's lists of candidates. Without equal entries the tensor itself is
    returned.

    Args:
        entries: [.., K, E], finite.
    """
    again = repeated(entries)
    if not bool(again.any()):
        return entries
    tables = entries.reshape(-1, *entries.shape[-2:]).clone()
    for table_KE, again_K in zip(tables, again.view(len(tables), -1)):
        places = again_K.nonzero()[:, 0]
        if not len(places):
            continue
        # With more equal entries than unused numbers, numbers repeat, and the second element counts
        # the turns.
        unused = _unused(table_KE[:, 0])
        turn = torch.arange(len(places), device=places.device) // len(unused)
        table_KE[places] = 0
        table_KE[places, 0] = unused.repeat(int(turn.max()) + 1)[: len(places)]
        if table_KE.shape[1] > 1:
            table_KE[places, 1] = turn.to(table_KE.dtype)
    return tables.view(entries.shape)


def apart(entries: Tensor) -> Tensor:
    """Tables in float16 in which equal entries are changed as little as possible: one that equals
    an earlier one gets the nearest first element that no entry of its table has.

    For tables that changed while tiles kept their codes: of 256 numbers that changed by 0.5 % of
    their root mean square, 2 became equal to another in float16, and the numbers of `distinct`
    changed the weights by 38 %. Without equal entries the tensor itself is returned.

    Args:
        entries: [.., K, E], finite.
    """
    again = repeated(entries)
    if not bool(again.any()):
        return entries
    tables = entries.reshape(-1, *entries.shape[-2:]).clone()
    for table_KE, again_K in zip(tables, again.view(len(tables), -1)):
        # One after another, because each takes a number that the next may not have.
        free = _unused(table_KE[:, 0]).sort().values
        if int(again_K.sum()) > len(free):
            return distinct(entries)
        for place in again_K.nonzero()[:, 0].tolist():
            nearest = int((free.float() - table_KE[place, 0].float()).abs().argmin())
            table_KE[place, 0] = free[nearest]
            free = torch.cat([free[:nearest], free[nearest + 1 :]])
    return tables.view(entries.shape)


def _unused(used_K: Tensor) -> Tensor:
    """All float16 numbers that are not used; those above all used ones first, ascending."""
    positive = _POSITIVE.to(used_K.device)
    above = torch.searchsorted(positive, used_K.abs().max(), right=True)
    numbers = torch.cat([positive[above:], positive[:above].flip(0), -positive[1:]])
    return numbers[~torch.isin(numbers.float(), used_K.float())]
