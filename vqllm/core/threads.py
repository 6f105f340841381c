"""Sums and factorizations that are the same whatever the number of threads.

torch shares the products of matrices out by rows and columns, so that each entry is one and the
same sum. A sum over all of a tensor and a factorization are cut into as many parts as there are
threads, and their last digits depend on it; one that decides about a code is then another code.
Measured with 1, 2 and 4 threads on matrices of 4096 x 576: products, softmax, attention and sums
over one axis are equal, `sum()`, Cholesky, inverse and eigenvalues are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it, or in a function that it decorates, torch computes with one thread."""
    num = torch.get_num_threads()
    if num == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num)


@one_thread()
def total(x: Tensor) -> Tensor:
    """The sum of all entries."""
    return x.sum()


@one_thread()
def mean(x: Tensor) -> Tensor:
    """The mean of all entries."""
    return x.mean()
