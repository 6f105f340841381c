"""What has to be set before torch and triton are imported, and fixtures for every test.

Where there is no CUDA device, Triton kernels run in its interpreter. The switch is read when a
kernel is defined, so it is set here, for the whole session; nothing but the parity tests runs
kernels on a CPU (`dispatch` takes them there only if forced), and the tests that compile kernels
without a device do so in a process of their own.
"""

import gc
import os
import sys

# Idle OpenMP threads that spin take the cores from those of other processes.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Several processes share the cores; one alone takes two, so that some sums are those of threads.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        no_device = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(no_device)
    from tests.support import known_gaps

    known_gaps.mark(items)


_frozen: tuple[str, int] = ("", 0)
"""The file of tests and the number of loaded modules when what was loaded was frozen last."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    global _frozen
    torch.manual_seed(0)  # whatever ran before in this process
    # What is loaded by now stays: a collection, of which tests of layers run dozens, then takes a
    # millisecond, in place of a second once numba, torch.compile and dozens of models are loaded.
    if _frozen != (state := (str(item.path), len(sys.modules))):
        gc.collect()
        gc.freeze()
        _frozen = state


def pytest_unconfigure() -> None:
    gc.unfreeze()  # so that what is left is freed in order when the process ends


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty is filled with NaN, so that a result that was not written shows."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poison(*args, allocate=allocate, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poison)
