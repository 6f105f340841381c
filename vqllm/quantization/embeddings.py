"""The input embedding and the output head: which of them is quantized, and when.

embedding alone   before the layers, which then see its decoded rows
head, or tied     after the layers, with the Hessian of the head's own input: what the model's
                  final norm makes of the last layer's output
"""

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vqllm.calibration.layer_calibrator import LayerCalibrator
from vqllm.calibration.layer_stream import LayerStream
from vqllm.checkpoint.packed_matrix import PackedMatrix
from vqllm.checkpoint.resume.shared_run import SharedRun
from vqllm.core.progress import Progress
from vqllm.errors import ModelError
from vqllm.hf.linears import is_linear, why_not_embedding
from vqllm.plan.packed_spec import linear_spec
from vqllm.quantization.row_blocks import Matrix, ReadRows, quantize_rows
from vqllm.recipes import Recipe
from vqllm_kernels.linear import LinearSpec

EMBEDDING, HEAD = "embedding", "head"
"""Names under which a run keeps them until it is finished."""


class EmbeddingAndHead:
    """The matrices outside the layers that a run quantizes.

    Attributes:
        specs: how they will be stored, by the module that stores them.
        tied: modules that use the tensors of another one, which is the value.
    """

    def __init__(self, stream: LayerStream, run: SharedRun, recipe: Recipe) -> None:
        self._stream, self._run = stream, run
        matrices = plan(stream.model, recipe)
        self._embedding = next((matrix for matrix in matrices if not matrix.is_head), None)
        self._head = next((matrix for matrix in matrices if matrix.is_head), None)
        self.specs: dict[str, LinearSpec] = {m.names[0]: m.spec for m in matrices}
        self.tied: dict[str, str] = {k: v for m in matrices for k, v in m.tied.items()}
        self._done = {
            key: run.load_packed(key)
            for key, matrix in ((EMBEDDING, self._embedding), (HEAD, self._head))
            if matrix
        }
        self._hessian: tuple[Tensor, int] | None = None

    @property
    def results(self) -> list[PackedMatrix]:
        """Those that are done."""
        return [kept for kept in self._done.values() if kept]

    @property
    def names(self) -> set[str]:
        """Full names of the modules that use the quantized matrices."""
        return {*self.specs, *self.tied}

    @property
    def head_is_due(self) -> bool:
        """Whether there is a head whose Hessian is to be measured."""
        return HEAD in self._done and self._done[HEAD] is None

    def quantize_embedding(self, tokens_SL: Tensor, progress: Progress) -> None:
        """Quantize an embedding that is not tied, and let the model run with the decoded rows.

        What is learned from its weights counts rows as often as their tokens are in the
        calibration text, and once more.
        """
        matrix = self._embedding
        if matrix is None:
            return
        kept = self._done[EMBEDDING]
        if kept is None:
            progress.phase("input embedding")
            counts_R = torch.bincount(tokens_SL.flatten(), minlength=matrix.spec.rows) + 1
            reader, device = self._reader(matrix), self._stream.device
            processes = self._run.processes
            made = quantize_rows(matrix, reader, device, weight_R=counts_R, processes=processes)
            kept = self._done[EMBEDDING] = self._run.save_packed(EMBEDDING, made)
        weight = self._stream.model.get_submodule(kept.name).weight
        tensors = {name: tensor.to(weight.device) for name, tensor in kept.tensors.items()}
        weight.data = kept.spec.dequantize(tensors, weight.dtype)

    def measure_head(self, calibrator: LayerCalibrator, last: int) -> None:
        """Measure the Hessian of the head's input, while the last layer is loaded."""
        assert self._head is not None, "a head is due"
        name = self._head.names[-1]
        hessian = calibrator.hessian_beyond(last, name, self._stream.model.get_submodule(name))
        self._hessian = hessian.matrix(name), hessian.num_tokens

    def quantize_head(self, progress: Progress) -> None:
        """Quantize the head if it is due, and its embedding with it if they are tied."""
        if not self.head_is_due:
            return
        assert self._head is not None, "a head is due"
        assert self._hessian is not None, "measured before"
        progress.phase("output head")
        H_CC, num_tokens = self._hessian
        reader = self._reader(self._head)
        device, processes = self._stream.device, self._run.processes
        made = quantize_rows(self._head, reader, device, H_CC, num_tokens, processes=processes)
        self._done[HEAD] = self._run.save_packed(HEAD, made)
        self._hessian = None

    def _reader(self, matrix: Matrix) -> ReadRows:
        stored = next(name for name in matrix.names if self._run.stores(name))
        return lambda start, stop: self._run.read_rows(stored, start, stop)


def plan(model: Any, recipe: Recipe) -> list[Matrix]:
    """What the recipe asks for outside the layers of a model.

    Args:
        model: a transformers model; its tensors may be on the meta device.

    Raises:
        ModelError: it has no such matrix, or one that cannot be stored so; says why.
    """
    wanted = {"embeddings": recipe.embeddings, "head": recipe.head}
    if not any(wanted.values()):
        return []
    found = {
        "embeddings": _named(model, "get_input_embeddings"),
        "head": _named(model, "get_output_embeddings"),
    }
    weights = [getattr(module, "weight", None) for _, module in filter(None, found.values())]
    tied = len(weights) == 2 and weights[0] is not None and weights[0] is weights[1]
    if tied and not all(wanted.values()):
        given, missing = ("embeddings", "head") if recipe.embeddings else ("head", "embeddings")
        raise ModelError(
            f"the embedding and the output head of {type(model).__name__} are one matrix (tied), "
            f"but the recipe has `{given}` and no `{missing}`. Set both, or neither: --set "
            f"{missing}='{{codec: ...}}' or --set {given}=null."
        )
    parts = {}
    for key, part in wanted.items():
        if part is not None:
            end = found[key]
            _check(model, key, end, found)
            assert end is not None, "checked"
            if not any(re.search(pattern, end[0]) for pattern in recipe.skip):
                parts[key] = (*end, part)
    if tied:
        if len(parts) < 2:
            return []
        names = (parts["embeddings"][0], parts["head"][0])
        assert recipe.head is not None, "checked"
        both = recipe.head.model_copy(update={"damping": recipe.head.tied_damping()})
        return [_matrix(names, parts["head"][1], recipe.of(both), is_head=True)]
    return [
        _matrix((name,), module, recipe.of(part), is_head=key == "head")
        for key, (name, module, part) in parts.items()
    ]


def check_called(model: Any, matrices: list[Matrix]) -> None:
    """Refuse a model that does not use these matrices by calling their modules.

    It is run on the meta device, which computes shapes only; a model that looks at values cannot
    be, and is seen when it runs.

    Args:
        model: on the meta device.
    """
    waiting = {name: matrix.keys for matrix in matrices for name in matrix.names}

    def seen(module: nn.Module, args: Any, name: str) -> None:
        waiting.pop(name, None)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(seen, name=name))
        for name in waiting
    ]
    tokens = torch.zeros(2, 4, dtype=torch.long, device="meta")
    # A mask that is whole: making one looks at values, which the meta device does not have.
    mask = torch.zeros(2, 1, 4, 4, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=tokens, attention_mask=mask, use_cache=False)
    except Exception:
        return
    finally:
        for handle in handles:
            handle.remove()
    for name, keys in waiting.items():
        changes = " ".join(f"--set {key}=null" for key in keys)
        raise ModelError(
            f"{type(model).__name__} does not call {name} when it runs, but uses its weight in "
            f"another way or not at all, so it cannot be quantized. Leave it as it is: {changes}."
        )


def _matrix(names: tuple[str, ...], module: nn.Module, recipe: Recipe, *, is_head: bool) -> Matrix:
    rows, cols = module.get_parameter("weight").shape
    spec = linear_spec(rows, cols, recipe)
    return Matrix(names=names, recipe=recipe, spec=spec, is_head=is_head)


def _named(model: Any, method: str) -> tuple[str, nn.Module] | None:
    """The module that a method of transformers' models returns, and its full name."""
    try:
        module = getattr(model, method)()
    except (AttributeError, NotImplementedError):  # how a model says that it has none
        return None
    return next(((n, m) for n, m in model.named_modules() if m is module), None)


def _check(
    model: Any,
    key: str,
    end: tuple[str, nn.Module] | None,
    found: dict[str, tuple[str, nn.Module] | None],
) -> None:
    """Raise ModelError unless the recipe's key can be applied to the module."""
    if end is None:
        method = {"embeddings": "get_input_embeddings", "head": "get_output_embeddings"}[key]
        problem = f"{method}() gives none"
    else:
        problem = _problem(model, key, end, {name for name, _ in filter(None, found.values())})
    if problem:
        raise ModelError(
            f"the recipe's `{key}` cannot be applied to {type(model).__name__}: {problem}. Leave "
            f"it as it is: --set {key}=null (and the other of embeddings and head, where the two "
            "are tied)."
        )


def _problem(model: Any, key: str, end: tuple[str, nn.Module], ends: set[str]) -> str | None:
    name, module = end
    if key == "embeddings":
        reason = why_not_embedding(module)
        if reason:
            return f"{name} cannot be decoded row by row: {reason}"
    elif not is_linear(module):
        return f"{name} is a {type(module).__name__}, not a torch.nn.Linear"
    weight = module.get_parameter("weight")
    others = [
        other
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight and other not in {f"{end}.weight" for end in ends}
    ]
    return f"its weight is also {', '.join(others)}" if others else None
