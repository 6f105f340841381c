"""The weights of a packed linear as its codec has them, so that codebooks and codes can move."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from vqllm.checkpoint.reader import Checkpoint
from vqllm.core.protocols import Codec, State
from vqllm.core.tiles import from_tiles, to_tiles
from vqllm.errors import CheckpointError, RecipeError
from vqllm.recipes import Recipe, from_dict
from vqllm.tuning.relative_parameter import RelativeParameter
from vqllm_kernels.linear import LinearSpec


class CodedWeights(nn.Module):
    """Ŵ [R, C] = transforms⁻¹(decode(codes, state)), with codes that can be exchanged.

    Attributes:
        learned: a `RelativeParameter` for each tensor of the codec's state that can be trained:
            codebooks, tables, scales of groups. A single scale of the whole matrix is not among
            them: scales of rows have it in them.
        records_gradients: whether gradients of the weights are added up.
        version: grows when codes are exchanged.
    """

    def __init__(
        self, spec: LinearSpec, codec: Codec, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        """Args:
        codec: one whose format is that of `spec`.
        tensors: as stored.
        dtype: of the weights that the model computes with.
        """
        super().__init__()
        self.spec, self.codec, self._dtype = spec, codec, dtype
        own, self._transforms = spec.split(dict(tensors))
        codes_IJM, self._state = codec.unpack(own, spec.rows, spec.cols)
        self.register_buffer("codes", codes_IJM, persistent=False)
        floating = {n: t for n, t in self._state.items() if t.is_floating_point()}
        if sum(t.numel() for t in floating.values()) == 1:
            floating = {}
        self.learned = {
            n: RelativeParameter(t, torch.float32, least=1e-9) for n, t in floating.items()
        }
        self._learned = nn.ModuleList(self.learned.values())  # what moves to other devices
        # Where each tile stands is of no matter if all it takes to decode one is shared by all.
        small, large = (codec.spec().layout(*_times(codec.tile, n)) for n in (1, 4096))
        self._alike = all(n in small and small[n] == large[n] for n in self._state)
        self._gradient_RC: Tensor | None = None
        self.records_gradients, self.version = False, 0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of tiles."""
        return tuple(self.get_buffer("codes").shape[:2])  # type: ignore[return-value]

    @property
    def trains(self) -> bool:
        """Whether the state moves, so that weights must be decoded at every call."""
        return any(own.delta.requires_grad for own in self.learned.values())

    def state(self) -> State:
        """The codec's state as it is now; what moves is float32."""
        return self._state | {name: own.value() for name, own in self.learned.items()}

    def decoded(self) -> Tensor:
        """Ŵ [R, C] in the model's own basis and dtype, with a gradient to what moves.

        In the backward pass it is decoded again: what lies between the state and the weights would
        take many times the memory of the weights.
        """
        if torch.is_grad_enabled() and self.trains:
            W_RC = recomputed(self._decoded, use_reentrant=False, preserve_rng_state=False)
        else:
            W_RC = self._decoded()
        assert isinstance(W_RC, Tensor)
        return W_RC

    def _decoded(self) -> Tensor:
        return self.weights_of(self.state()).to(self._dtype)

    def weights_of(self, state: State) -> Tensor:
        """Ŵ [R, C] in the model's own basis with this state of the codec, float32."""
        X_IJE = self.codec.decode(self.get_buffer("codes"), state)
        return self._own_basis(self._matrix(X_IJE))

    @property
    def codes_IJM(self) -> Tensor:
        """The codes, as the codec has them."""
        return self.get_buffer("codes")

    def set_state(self, state: State) -> None:
        """Let what is learned be as in this state."""
        with torch.no_grad():
            for name, own in self.learned.items():
                own.delta.copy_(
                    (state[name].float() - own.get_buffer("old")) / own.get_buffer("unit")
                )
        self.version += 1

    def tiles(self) -> Tensor:
        """The decoded tiles [I, J, E] in the codec's basis, float32."""
        return self.codec.decode(self.get_buffer("codes"), self.state())

    def _matrix(self, X_IJE: Tensor) -> Tensor:
        return from_tiles(X_IJE, self.codec.tile, self.spec.rows, self.spec.cols)

    def _own_basis(self, W_RC: Tensor) -> Tensor:
        for transform, state in reversed(list(zip(self.spec.transforms, self._transforms))):
            W_RC = transform.inverse(W_RC, state)
        return W_RC

    def with_recorded_gradient(self, W_RC: Tensor) -> Tensor:
        """The same weights; while `records_gradients`, their gradients are added up."""
        if not self.records_gradients or not torch.is_grad_enabled():
            return W_RC
        if not W_RC.requires_grad:
            W_RC = W_RC.detach().requires_grad_()
        W_RC = W_RC.view_as(W_RC)
        W_RC.register_hook(self._add_gradient)
        return W_RC

    def _add_gradient(self, gradient_RC: Tensor) -> None:
        if self._gradient_RC is None:
            self._gradient_RC = gradient_RC.float()
        else:
            self._gradient_RC += gradient_RC

    @property
    def gradient_RC(self) -> Tensor | None:
        """What was recorded since `take_gradient`, in the model's basis, float32 [R, C]."""
        return self._gradient_RC

    def take_gradient(self) -> Tensor:
        """The sum of the gradients that were recorded, of the decoded tiles [I, J, E]; begins anew.

        It is 0 in the padding of the matrix.
        """
        gradient_RC, self._gradient_RC = self._gradient_RC, None
        codes = self.get_buffer("codes")
        if gradient_RC is None:
            gradient_RC = torch.zeros(self.spec.rows, self.spec.cols, device=codes.device)
        with torch.enable_grad():
            # The basis changes linearly: any point has the same derivative.
            point_RC = torch.zeros_like(gradient_RC, requires_grad=True)
            (own_RC,) = torch.autograd.grad(self._own_basis(point_RC), point_RC, gradient_RC)
        return to_tiles(own_RC, self.codec.tile)

    def nearest(self, X_KE: Tensor, where_K: Tensor) -> Tensor:
        """Codes [K, M] of the reproductions nearest to tiles [K, E] at the places `where_K`, which
        count the grid row by row."""
        with torch.no_grad():
            state = self.codec.project(self.state())
            if self._alike:
                return self.codec.encode(X_KE[None], state)[0]
            X_IJE = self.codec.decode(self.get_buffer("codes"), state)
            X_IJE.view(-1, X_IJE.shape[-1])[where_K] = X_KE
            return self.codec.encode(X_IJE, state).flatten(0, 1)[where_K]

    def codes_at(self, where_K: Tensor) -> Tensor:
        """Codes [K, M] of the tiles at these places."""
        return self.get_buffer("codes").flatten(0, 1)[where_K]

    def set_codes(self, codes_KM: Tensor, where_K: Tensor) -> None:
        """Take these codes for the tiles at these places."""
        codes = self.get_buffer("codes")
        codes.view(-1, codes.shape[-1])[where_K] = codes_KM.to(codes)
        self.version += 1

    def packed(self) -> dict[str, Tensor]:
        """The tensors of the format as they are to be stored, on the CPU."""
        with torch.no_grad():
            stored = self.codec.pack(self.get_buffer("codes"), self.codec.project(self.state()))
        return {name: tensor.detach().cpu().clone() for name, tensor in stored.items()}


def _times(tile: tuple[int, int], factor: int) -> tuple[int, int]:
    return tile[0] * factor, tile[1] * factor


def codecs_of(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Codec]:
    """The codecs that coded these linears of the layers, from the recipe that the checkpoint keeps.

    Raises:
        CheckpointError: it keeps none, or one that does not have the format of a linear.
    """
    values = checkpoint.quantization.extra.get("recipe")
    where = f"{checkpoint.folder} does not say how it was coded"
    advice = "Leave out `codebooks` and stages that move codes, or quantize it anew."
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: its config.json has no recipe. {advice}")
    try:
        recipe: Recipe = from_dict(values, f"the recipe in {checkpoint.folder}")
    except RecipeError as error:
        raise CheckpointError(f"{where}: {error} {advice}") from error
    known = list(recipe.codecs) + ([] if recipe.fragile is None else [recipe.fragile.codec])
    by_format = {codec.spec(): codec for codec in reversed(known)}
    found = {}
    for name in names:
        codec = by_format.get(checkpoint.linears[name].format)
        if codec is None:
            raise CheckpointError(
                f"{where}: {name} has the format {checkpoint.linears[name].format}, which no codec "
                f"of its recipe writes. {advice}"
            )
        found[name] = codec
    return found
