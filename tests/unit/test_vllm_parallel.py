"""Processes of vLLM that share out a layer, simulated by threads with a vLLM of a few lines.

A recipe with `tensor_parallel` makes a checkpoint of which they gather no activations: a layer then
adds up twice, as a dense one does.
"""

import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.fake_checkpoint import random_packed
from tests.support.tiny import tiny_model
from vqllm import recipes
from vqllm.plan.cuts import cuts_of, divided
from vqllm.plan.packed_spec import linear_spec
from vqllm_kernels.linear import LinearSpec

HIDDEN, INNER, HEADS, KEYS, HEAD = 128, 256, 8, 4, 32
SHAPES = {
    "q_proj": (HEADS * HEAD, HIDDEN),
    "k_proj": (KEYS * HEAD, HIDDEN),
    "v_proj": (KEYS * HEAD, HIDDEN),
    "o_proj": (HIDDEN, HEADS * HEAD),
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}


class Group:
    """Threads in the place of processes, and how often they communicated."""

    def __init__(self, size: int) -> None:
        self.size, self.calls = size, 0
        self.own, self.sent = threading.local(), [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def exchange(self, x: Tensor) -> list[Tensor]:
        self.sent[self.own.rank] = x
        self.barrier.wait()
        every = list(self.sent)
        if self.own.rank == 0:
            self.calls += 1
        self.barrier.wait()
        return every

    def gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat(self.exchange(x), dim)

    def add_up(self, x: Tensor) -> Tensor:
        return torch.stack(self.exchange(x)).sum(0)

    def run(self, work: Callable[[int], Tensor]) -> list[Tensor]:
        found: dict[int, Tensor] = {}

        def one(rank: int) -> None:
            self.own.rank = rank
            found[rank] = work(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[rank] for rank in range(self.size)]


class LinearBase(nn.Module):
    def __init__(self, rank: int, size: int, cols: int) -> None:
        super().__init__()
        self.tp_rank, self.tp_size, self.vqllm_dtype = rank, size, torch.float32
        self.input_size_per_partition = cols // size
        self.reduce_results, self.skip_bias_add, self.bias = True, False, None


class RowParallelLinear(LinearBase):
    pass


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group of 2, of which `held` asks."""
    group = Group(2)
    linear, distributed = ModuleType("linear"), ModuleType("distributed")
    linear.LinearBase, linear.RowParallelLinear = LinearBase, RowParallelLinear  # type: ignore
    distributed.tensor_model_parallel_all_gather = group.gather  # type: ignore
    names = ("vllm", "vllm.model_executor", "vllm.model_executor.layers")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.linear", linear)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    monkeypatch.delitem(sys.modules, "vqllm.integrations.vllm.held", raising=False)
    yield group
    sys.modules.pop("vqllm.integrations.vllm.held", None)


def specs_of(num: int, recipe: str) -> dict[str, LinearSpec]:
    """What a recipe for `num` processes makes of the linears of a layer."""
    made = recipes.load(recipe).model_copy(update={"tensor_parallel": num})
    model = tiny_model("llama", num_attention_heads=HEADS, num_key_value_heads=KEYS)
    cuts = cuts_of(model, SHAPES, made)
    return {
        name: linear_spec(*shape, divided(made, cuts.get(name))) for name, shape in SHAPES.items()
    }


def layer_of(
    group: Group, specs: dict[str, LinearSpec], tensors: dict[str, dict[str, Tensor]], rank: int
) -> Callable[[Tensor], Tensor]:
    """A layer of which values stand for attention: o reads v of all heads."""
    from vqllm.integrations.vllm import cuts
    from vqllm.integrations.vllm.held import Held, Plan

    def held(kind: type[LinearBase], *names: str) -> Callable[[Tensor], Tensor]:
        own = [specs[name] for name in names]
        layer = kind(rank, group.size, own[0].cols)
        size = 1 if kind is RowParallelLinear else group.size
        ranges = [[cuts.Piece(spec.rows).own(rank if size > 1 else 0, size)] for spec in own]
        plan = Plan.of(layer, names, own, ranges, True)  # type: ignore[arg-type]
        parts = Held.of(layer, plan, own, [tensors[name] for name in names])  # type: ignore
        is_row = kind is RowParallelLinear

        def multiply(x: Tensor) -> Tensor:
            y = parts.multiply(layer, x, None)  # type: ignore[arg-type]
            return group.add_up(y) if is_row and layer.reduce_results else y

        return multiply

    qkv = held(LinearBase, "q_proj", "k_proj", "v_proj")
    o = held(RowParallelLinear, "o_proj")
    gate_up = held(LinearBase, "gate_proj", "up_proj")
    down = held(RowParallelLinear, "down_proj")

    def run(x: Tensor) -> Tensor:
        q, k, v = qkv(x).split([HEADS * HEAD // 2, KEYS * HEAD // 2, KEYS * HEAD // 2], -1)
        x = x + o(q + torch.cat([k, v], -1))
        gate, up = gate_up(x).chunk(2, -1)
        return x + down(torch.nn.functional.silu(gate) * up)

    return run


def dense(specs: dict[str, LinearSpec], tensors: dict[str, dict[str, Tensor]], x: Tensor) -> Tensor:
    W = {name: spec.dequantize(tensors[name]) for name, spec in specs.items()}
    q, k, v = (x @ W[name].T for name in ("q_proj", "k_proj", "v_proj"))
    own = KEYS * HEAD // 2
    mixed = [torch.cat([k[..., i : i + own], v[..., i : i + own]], -1) for i in (0, own)]
    x = x + (q + torch.cat(mixed, -1)) @ W["o_proj"].T
    inner = torch.nn.functional.silu(x @ W["gate_proj"].T) * (x @ W["up_proj"].T)
    return x + inner @ W["down_proj"].T


@pytest.mark.parametrize(
    ("recipe", "num", "calls"),
    [
        ("e8p-2bit", 1, 6),
        ("e8p-2bit", 2, 2),
        ("e8p-2bit", 8, 2),  # more than heads of keys
        ("trellis-2bit-fast", 2, 2),
        ("spread-2bit", 2, 2),
    ],
)
def test_how_often_a_layer_communicates(group: Group, recipe: str, num: int, calls: int) -> None:
    specs = specs_of(num, recipe)
    tensors = {name: random_packed(spec, i) for i, (name, spec) in enumerate(specs.items())}
    x = 0.1 * torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    ys = group.run(lambda rank: layer_of(group, specs, tensors, rank)(x))
    want = dense(specs, tensors, x)
    for y in ys:
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert group.calls == calls
