"""What decides about codes is the same with any number of threads."""

from collections.abc import Callable, Iterator

import pytest
import torch

from vqllm.codecs.base import root_mean_square
from vqllm.core import linalg, metrics, threads

W = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
H = W.T @ W / len(W) + torch.eye(400)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    num = torch.get_num_threads()
    yield
    torch.set_num_threads(num)


@pytest.mark.parametrize(
    "compute",
    [
        lambda: threads.total(W),
        lambda: threads.mean(W),
        lambda: linalg.cholesky(H),
        lambda: linalg.block_ldl(H, 8)[0],
        lambda: root_mean_square(W[None], None),
        lambda: root_mean_square(W[None], W[None].abs()),
        lambda: torch.tensor(metrics.proxy_loss(W, W * 1.01, H)),
        lambda: torch.tensor(metrics.sqnr_db(W, W * 1.01)),
        lambda: W @ H,  # by torch itself
    ],
)
def test_any_number_of_threads(compute: Callable[[], torch.Tensor]) -> None:
    found = []
    for num in (1, 2, 3):
        torch.set_num_threads(num)
        found.append(compute())
        assert torch.get_num_threads() == num
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
