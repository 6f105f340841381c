"""The registries of tuning steps, and what a step on a whole model is given."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn

from vqllm.core.distributed import Processes
from vqllm.core.protocols import JSON, Part, Tuning
from vqllm.core.registry import Registry
from vqllm.errors import ModelError

TUNINGS: Registry[Tuning] = Registry("tuning")

EVALUATION_TOKENS = 2048
"""Held-out tokens of an evaluation: 4 % of the time of 240 steps of 512 tokens each."""

CODES = "codes"
"""Among the kinds of what moves: it has no parameters."""


class StateStore(Protocol):
    """Holds the state of a stage, so that an interrupted run goes on from there."""

    def load(self) -> tuple[JSON, dict[str, Tensor]] | None:
        """What was saved last, in this run or an earlier one; None if nothing was. It is not
        changed in place."""
        ...

    def save(self, record: JSON, tensors: Mapping[str, Tensor]) -> None:
        """Save this in place of what was saved before. The tensors may change afterwards."""
        ...


def seconds_of(text: str) -> int | None:
    """Seconds of a duration such as 1h30m; None for anything else."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if found is None or not any(found.groups()):
        return None
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds or None


def _checked_duration(text: object) -> object:
    if not isinstance(text, str) or seconds_of(text) is None:
        raise ValueError(f"{text!r} is no duration; write 90s, 20m or 1h30m")
    return text


Duration = Annotated[str, BeforeValidator(_checked_duration)]
"""What `seconds_of` reads."""


def evaluation_sequences(held_out_SL: Tensor) -> Tensor:
    """The held-out sequences that evaluations measure, `EVALUATION_TOKENS` of them. Spread evenly:
    sequences of one source follow each other."""
    num, length = held_out_SL.shape
    num_taken = min(num, max(1, EVALUATION_TOKENS // length))
    return held_out_SL[torch.arange(num_taken) * num // num_taken]


class DecoderLayers(Protocol):
    """The decoder layers of a model, run one at a time."""

    @property
    def names(self) -> list[str]:
        """Full module name of each, which the names of its parameters begin with."""
        ...

    def ready(self, index: int) -> AbstractContextManager[object]:
        """Within, the layer can run."""
        ...

    def run(
        self, index: int, tokens: Tensor, states: Tensor | None, *, grad: bool = False
    ) -> Tensor | None:
        """The hidden states [S, ..] that a layer gives for tokens [S, L] and its input, which is
        None for the first one; layers are run in order. `grad`: with what gradients need."""
        ...


class CodedMatrix(Protocol):
    """A quantized matrix whose codes a stage may exchange. Tiles are [E] in the codec's basis."""

    records_gradients: bool
    """whether gradients of the weights are added up"""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of tiles."""
        ...

    def tiles(self) -> Tensor:
        """What the codes reproduce, float32 [I, J, E]."""
        ...

    def take_gradient(self) -> Tensor:
        """The sum of the gradients of the tiles since the last call, float32 [I, J, E]."""
        ...

    def nearest(self, X_KE: Tensor, where_K: Tensor) -> Tensor:
        """Codes [K, M] nearest to these tiles, at places that count the grid row by row."""
        ...

    def codes_at(self, where_K: Tensor) -> Tensor:
        """Codes [K, M] of the tiles at these places."""
        ...

    def set_codes(self, codes_KM: Tensor, where_K: Tensor) -> None:
        """Take these codes for the tiles at these places."""
        ...


class FittedLinear(Protocol):
    """A quantized linear whose codebooks and scales a stage may fit to given weights."""

    in_features: int

    def fit(
        self, W_RC: Tensor, H_CC: Tensor, kinds: Collection[str], steps: int
    ) -> tuple[float, float]:
        """Move parameters of these kinds to where tr((W − Ŵ) H (W − Ŵ)ᵀ) is least; that loss before
        and after, relative to tr(W H Wᵀ)."""
        ...

    def renew(self) -> None:
        """Compute with weights that are decoded anew, after codebooks moved by other means."""
        ...

    def register_forward_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """As of a module."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelTask:
    """A quantized model, the original, and the text on which the one is made to follow the other.

    `student` and `teacher` give logits [S, L, V] of tokens [S, L] on `device`. `parameters` are
    relative changes of what the student lets move, float32, by kind and name; `codes` are its
    matrices by name where a stage moves codes. Training and held-out sequences are int64 [S, L].
    """

    student: Callable[[Tensor], Tensor]
    teacher: Callable[[Tensor], Tensor]
    parameters: Mapping[str, Mapping[str, nn.Parameter]]
    sequences: Tensor
    held_out: Tensor
    seed: int
    device: torch.device
    states: StateStore
    """of the stage"""
    report_progress: Callable[[float], None]
    """is called with the share of the stage that is done, from 0 to 1"""
    codes: Mapping[str, CodedMatrix] = field(default_factory=dict)
    linears: Mapping[str, FittedLinear] = field(default_factory=dict)
    """the quantized linears of the layers by name"""
    processes: Processes = field(default_factory=Processes)
    """which share the work; each has the whole of everything above"""
    in_step: bool = False
    """whether all processes must call the student equally often"""
    student_layers: Callable[[list[str]], DecoderLayers] | None = None
    """those of these names"""
    teacher_layers: Callable[[], DecoderLayers] | None = None
    """with one of them in memory at a time"""


class ModelTuning(Part, ABC):
    """A stage that tunes a whole quantized model against the original."""

    @property
    @abstractmethod
    def kinds(self) -> frozenset[str]:
        """The kinds of parameters that it moves."""

    def check(self, parameters: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        """Refuse a model of which there is nothing to move.

        Args:
            parameters: by kind and name, as in `ModelTask`.

        Raises:
            ModelError: it has no parameters of any of the kinds.
        """
        if not self.kinds & parameters.keys():
            raise ModelError(
                f"{self.type}: nothing to tune: the model has none of "
                f"{', '.join(sorted(self.kinds - {CODES}))}. Add kinds to `train` (codecs whose "
                "values are computed have no codebooks)."
            )

    @property
    def recomputes(self) -> bool:
        """Whether gradients compute what is inside of layers again, in place of keeping it."""
        return False

    @property
    def by_layers(self) -> bool:
        """Whether it compares the outputs of layers and asks for no predictions."""
        return False

    @property
    def reads_weights(self) -> bool:
        """Whether it reads the decoded weights themselves, of which no process may hold a part."""
        return False

    @abstractmethod
    def __call__(self, task: ModelTask) -> JSON:
        """Move the parameters in place; they end at the best state that was found.

        Returns:
            what the report says about the stage: JSON values that a repeated run gives again.
        """


MODEL_TUNINGS: Registry[ModelTuning] = Registry("tuning stage")
