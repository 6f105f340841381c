"""What each of several processes does: sequences, parts of sums, linears, rows."""

import pickle

import pytest
import torch

from vqllm import recipes
from vqllm.calibration.hessian import InputGroup, InputHessian
from vqllm.calibration.passes import unit_of
from vqllm.calibration.shares import Share, spread
from vqllm.core import linalg
from vqllm.core.distributed import Processes
from vqllm.core.parcels import Parcel, join, part
from vqllm.quantization.spreading import Spread, _ends

CPU = torch.device("cpu")
BATCHES = [slice(start, min(start + 4, 50)) for start in range(0, 50, 4)]


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_rounds_have_every_batch_once_in_order(size: int) -> None:
    shares = [Share(Processes(rank, size), unit=8) for rank in range(size)]
    rounds = zip(*(share.rounds(BATCHES) for share in shares), strict=True)
    assert [rows for own in rounds for batches in own for rows in batches] == BATCHES


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_states_of_a_process_are_one_behind_the_other(size: int) -> None:
    for rank in range(size):
        share = Share(Processes(rank, size), unit=8)
        end = 0
        for rows in filter(share.is_own, BATCHES):
            held = share.held(rows)
            assert held.start == end
            end = held.stop
        assert share.num_held(50) == end


def test_a_unit_has_whole_batches_and_the_sequences_that_tell_groups() -> None:
    assert unit_of(torch.zeros(512, 128), CPU) == 16
    assert unit_of(torch.zeros(9, 2048), CPU) == 1
    assert unit_of(torch.zeros(9, 2048), torch.device("cuda")) == 4


def test_costs_are_spread() -> None:
    assert spread([1, 5, 2, 2], 2) == [1, 0, 1, 1]
    assert spread([3, 3, 3], 2) == [0, 1, 0]


def test_parts_of_a_hessian_are_those_of_the_whole() -> None:
    x_NC = torch.randn(40, 1100).bfloat16()
    whole = InputHessian.empty(1100, CPU)
    whole.add(x_NC)
    parts = InputHessian.empty(1100, CPU)
    for number in range(len(linalg.symmetric_blocks(1100))):
        parts.blocks = {number}
        parts.add(x_NC)
    assert torch.equal(parts.total_CC, whole.total_CC)


def test_a_parcel_comes_as_it_went() -> None:
    tensors = [torch.randn(2, 3, 4).transpose(0, 2), torch.empty(0), torch.tensor(True)]
    value = {"a": (tensors[0], 1), "b": tensors[1:], "rows": slice(1, 2)}
    parcel, sent = Parcel.of(value)
    parcel = pickle.loads(pickle.dumps(parcel))
    found = parcel.opened(part(join(sent, CPU), parcel.forms))
    assert torch.equal(found["a"][0], tensors[0])
    assert found["a"][0].stride() == tensors[0].stride()
    assert found["b"][0].shape == (0,)
    assert bool(found["b"][1])
    assert found["rows"] == slice(1, 2)


def test_rows_end_after_whole_tiles() -> None:
    assert _ends(576, 64, 2) == [320, 576]
    assert _ends(100, 1, 3) == [64, 100, 100]
    assert _ends(200, 48, 2) == [192, 200]


def test_linears_are_spread_and_large_ones_cut() -> None:
    groups = [InputGroup(("q", "k", "v"))]
    shapes = {"q": (576, 576), "k": (192, 576), "v": (192, 576)}
    fast = dict.fromkeys(shapes, recipes.load("trellis-2bit-fast"))
    found = Spread.of(groups, shapes, fast, Processes(0, 2))
    assert found.by_rows == {"q"}
    assert found.owners == {"q": 0, "k": 0, "v": 1}
    assert [name for name in shapes if found.is_here(name)] == ["q", "k"]
    two_sided = dict.fromkeys(shapes, recipes.load("spread-2bit"))
    found = Spread.of(groups, shapes, two_sided, Processes(1, 2))
    assert not found.by_rows
    assert found.owners == {"q": 0, "k": 1, "v": 1}


def test_linears_of_an_expert_stay_together() -> None:
    groups = [InputGroup((f"{e}.gate", f"{e}.up"), "experts input") for e in range(3)]
    shapes = dict.fromkeys([name for group in groups for name in group.names], (64, 64))
    found = Spread.of(
        groups, shapes, dict.fromkeys(shapes, recipes.load("e8p-2bit")), Processes(0, 2)
    )
    assert [found.owners[f"{e}.gate"] for e in range(3)] == [0, 1, 0]
    assert all(found.owners[f"{e}.gate"] == found.owners[f"{e}.up"] for e in range(3))
