"""Several processes at work on one model, as `torchrun` or `accelerate launch` started them."""

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from vqllm.core.parcels import Form, Parcel, join, part
from vqllm.core.watch import ProcessNote, Watch
from vqllm.errors import VqllmError

T = TypeVar("T")

CPU = torch.device("cpu")
PATIENCE = timedelta(days=7)
"""torch's own 10 to 30 minutes would end a run that waits for its first process."""


@dataclass(frozen=True)
class Processes:
    """This process among those that work together; alone by default."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    """where tensors are that are sent"""

    @classmethod
    def started(cls, device: torch.device) -> "Processes":
        """All that were started together, connected (gloo on a CPU, NCCL on CUDA)."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        # The first process samples text and writes, which may take hours, while the others wait.
        state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, state.device or CPU)

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

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank, in every process; they are pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def together(self, make: Callable[[], T]) -> T:
        """What this process makes, after all have made theirs; if one fails, its error in all."""
        made: list[T] = []
        error = None
        try:
            made.append(make())
        except VqllmError as own:
            error = own
        if self.size == 1 and error is not None:
            raise error
        for found in self.gather(error):
            if found is not None:
                raise found
        return made[0]

    def exchange(self, value: T) -> list[T]:
        """The values of all processes by rank, in every process: of any type that can be pickled.
        Tensors in them are sent as they are."""
        if self.size == 1:
            return [value]
        parcel, sent = Parcel.of(value)
        parcels = self.gather(parcel)
        received = self._swap([sent] * self.size, [own.forms for own in parcels])
        return self._opened(value, parcels, received)

    def deliver(self, values: Sequence[T]) -> list[T]:
        """Send a value to every process.

        Args:
            values: what each process gets from this one, by its rank.

        Returns:
            what this one gets from each, by rank.
        """
        if self.size == 1:
            return list(values)
        packed = [Parcel.of(value) for value in values]
        parcels = [own[self.rank] for own in self.gather([parcel for parcel, _ in packed])]
        received = self._swap([sent for _, sent in packed], [own.forms for own in parcels])
        return self._opened(values[self.rank], parcels, received)

    def _opened(
        self, own: T, parcels: Sequence[Parcel], received: Sequence[Sequence[Tensor]]
    ) -> list[T]:
        """What came from each process; this one's is as it was."""
        return [
            own if rank == self.rank else parcel.opened(tensors)
            for rank, (parcel, tensors) in enumerate(zip(parcels, received))
        ]

    def _swap(
        self, sent: Sequence[Sequence[Tensor]], forms: Sequence[Sequence[Form]]
    ) -> list[list[Tensor]]:
        """Send tensors to each process, and receive those of these forms from each."""
        operations, buffers = [], {}
        joined: dict[int, Tensor] = {}  # one buffer for what goes to several
        for other in sorted(set(range(self.size)) - {self.rank}):
            if sent[other]:
                key = id(sent[other])
                if key not in joined:
                    joined[key] = join(sent[other], self.device)
                operations.append(distributed.P2POp(distributed.isend, joined[key], other))
            num_bytes = sum(form.padded_bytes for form in forms[other])
            buffers[other] = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            if num_bytes:
                operations.append(distributed.P2POp(distributed.irecv, buffers[other], other))
        for work in distributed.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return [
            part(buffers[other], forms[other]) if other in buffers else []
            for other in range(self.size)
        ]

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

    def in_turn(self, make: Callable[[], T]) -> T:
        """What this process makes, after the first of its machine has made its own: what that one
        downloads or converts is there for the others. If one fails, its error in all."""
        comes_first = os.environ.get("LOCAL_RANK", "0") == "0"
        made = self.together(lambda: make() if comes_first else None)
        return self.together(lambda: made if made is not None else make())

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within, all but the first process print nothing but errors."""
        if self.is_first:
            yield
            return
        before = logging.root.manager.disable
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            try:
                yield
            finally:
                logging.disable(before)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, the end of any process ends all, with its name in the message."""
        if self.size == 1:
            yield
            return
        watch = Watch(self.rank, self.gather(ProcessNote.own(self.rank)), self.gather)
        try:
            yield
        except BaseException as error:
            watch.close(error)
            raise
        watch.close()

    def leave(self) -> None:
        """Disconnect when the shared work is done. Not called after an error: the launcher then
        ends the other processes, which may be waiting."""
        if self.size > 1:
            distributed.barrier()
            distributed.destroy_process_group()
