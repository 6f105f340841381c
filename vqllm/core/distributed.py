"""Several processes at work on one model, as `torchrun` or `accelerate launch` started them."""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from vqllm.errors import VqllmError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""torch's own 10 to 30 minutes would end a run that waits for its first process."""


@dataclass(frozen=True)
class Processes:
    """This process among those that work together; alone by default."""

    rank: int = 0
    size: int = 1

    @classmethod
    def started(cls, device: torch.device) -> "Processes":
        """All that were started together, connected (gloo on a CPU, NCCL on CUDA)."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        # The first process samples text and writes, which may take hours, while the others wait.
        state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        return cls(state.process_index, state.num_processes)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def own(self, items: Tensor) -> Tensor:
        """The share of this process in the items along the first axis."""
        return items[self.rank :: self.size]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the tensors of all processes, the same in each."""
        if self.size > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def broadcast(self, make: Callable[[], T]) -> T:
        """What the first process makes, in every process; so is the error if it fails."""
        if self.size == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        result: list[object] = [None, None]
        if self.is_first:
            try:
                result[0] = make()
            except VqllmError as error:
                result[1] = error
        broadcast_object_list(result)
        if isinstance(result[1], VqllmError):
            raise result[1]
        return result[0]  # type: ignore[return-value]

    def on_first(self, make: Callable[[], T]) -> T | None:
        """What the first process makes, there; None in the others, after it was made."""
        made: list[T] = []
        self.broadcast(lambda: made.append(make()))
        return made[0] if made else None

    def split(self, module: nn.Module, parameters: Collection[nn.Parameter]) -> None:
        """Let each process hold a part of these parameters of a module, which do not change.

        A process has all of them only while the module runs forward or backward. The module must
        run equally often in all processes.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device = next(iter(parameters)).device.type
        others = {parameter for parameter in module.parameters() if parameter not in parameters}
        mesh = init_device_mesh(device, (self.size,))
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=others)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()

    def leave(self) -> None:
        """Disconnect when the shared work is done. Not called after an error: the launcher then
        ends the other processes, which may be waiting."""
        if self.size > 1:
            distributed.barrier()
            distributed.destroy_process_group()
