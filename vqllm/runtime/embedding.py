"""An embedding whose rows stay packed until they are looked up."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqllm.hf.linears import AfterLookup, after_lookup
from vqllm.runtime import cache
from vqllm.runtime.packed import Fingerprint, PackedModule
from vqllm_kernels import dispatch
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.transforms import HadamardSpec

if TYPE_CHECKING:
    from vqllm_kernels.cpu.chains import Chain

CHUNK_WEIGHTS = 1 << 22
"""Weights that are decoded at a time: 16 MB in float32."""


class VQEmbedding(PackedModule, nn.Embedding):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Rows of a packed matrix by token, in the dtype of the model.

    It is an `nn.Embedding` to code that looks for embeddings, as adapters (LoRA) do.

    Only the looked-up rows are decoded. One row of 576 features takes 0.1 ms on a CPU, 2048 take
    11 ms (E8P twice) or 36 ms (uniform), so unlike linears an embedding keeps its decoded weights
    only where the weight cache is "on".

    Attributes:
        rest: what the model's own kind of embedding does to the rows after the look-up, if
            anything (Gemma scales them).
    """

    rest: AfterLookup | None

    def __init__(
        self,
        spec: LinearSpec,
        dtype: torch.dtype,
        rest: AfterLookup | None = None,
        padding_idx: int | None = None,
        device: torch.device | str = "meta",
    ) -> None:
        """An empty embedding.

        Args:
            spec: what is packed, and how; it must be `row_wise`.
            dtype: that of the rows.
            padding_idx: as that of `nn.Embedding`, where it means something to training only.
            device: where the tensors are made; "meta" waits for a loader to fill them.
        """
        super().__init__(spec, dtype, device)
        if not spec.row_wise():
            raise ValueError(f"rows of {spec} cannot be decoded one by one")
        self.num_embeddings, self.embedding_dim = spec.rows, spec.cols
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._chain: Chain | None = None
        self._chain_from: Fingerprint | None = None
        self.rest = rest

    @classmethod
    def like(cls, module: nn.Embedding, spec: LinearSpec) -> "VQEmbedding":
        """An empty embedding in the place of `module`."""
        return cls(spec, module.weight.dtype, after_lookup(module), module.padding_idx)

    @property
    def embed_scale(self) -> Any:
        """What rows are multiplied by (Gemma), where adapters look for it; AttributeError without.

        An adapter's rows are multiplied by it, too.
        """
        return getattr(self.rest, "embed_scale")  # noqa: B009 - None has none either

    def forward(self, input: Tensor) -> Tensor:
        """Rows [..., embedding_dim] of tokens [...]."""
        W_RC = self._kept_weights(self._dtype)
        rows = self._decoded(input) if W_RC is None else F.embedding(input, W_RC)
        return rows if self.rest is None else self.rest(rows)

    def _decoded(self, tokens: Tensor) -> Tensor:
        """Rows of tokens [...], decoded a chunk of tokens at a time."""
        if tokens.numel() == 0:
            shape = (*tokens.shape, self.embedding_dim)
            return torch.empty(shape, dtype=self._dtype, device=tokens.device)
        chunk = max(1, CHUNK_WEIGHTS // (self.spec.format.tile[0] * self.embedding_dim))
        own, states = self.spec.split(self.packed)
        chain = self._compiled_transforms()
        parts = []
        for index_N in tokens.reshape(-1).long().split(chunk):
            if chain is not None:
                rows = self.spec.format.decode_rows(own, index_N, self.embedding_dim)
                parts.append(chain.few_rows(rows, self._dtype))
                continue
            parts.append(looked_up(self.spec, own, states, index_N).to(self._dtype))
        return torch.cat(parts).view(*tokens.shape, self.embedding_dim)

    def _compiled_transforms(self) -> "Chain | None":
        """The transforms of a row as one call of compiled code: the operators of a single row take
        a millisecond where a token of a small model takes 40. None where they are to be used."""
        if self.device.type != "cpu" or torch.compiler.is_compiling() or dispatch.is_forced():
            return None
        if self._chain_from is None or not self._chain_from.holds():
            self._chain_from, self._chain = Fingerprint([self]), self._made_chain()
        return self._chain

    def _made_chain(self) -> "Chain | None":
        from vqllm_kernels.compilers import why_no_numba

        if why_no_numba() or any(not isinstance(t, HadamardSpec) for t in self.spec.transforms):
            return None
        from vqllm_kernels.cpu.chains import chain

        _, states = self.spec.split(self.packed)
        with torch.inference_mode(False), torch.no_grad():
            stages = list(zip(self.spec.transforms, states))[::-1]
            made = chain(stages, self.embedding_dim, "output")  # the inverse is the transpose
        return None if isinstance(made, str) else made

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_chain": None, "_chain_from": None}

    def keeps_weights(self) -> bool:
        """Whether the decoded weights are kept from one call to the next."""
        return cache.weight_cache() == "on" and super().keeps_weights()

    def extra_repr(self) -> str:
        transforms = ", ".join(t.kind for t in self.spec.transforms) or "none"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, format={self.spec.format.format_id}, "
            f"transforms={transforms}"
        )


def looked_up(
    spec: LinearSpec, own: dict[str, Tensor], states: Sequence[dict[str, Tensor]], index_N: Tensor
) -> Tensor:
    """Rows of W, float32 [N, cols], by their numbers.

    Args:
        own, states: the tensors of the format and of each transform, as `spec.split` gives them.
    """
    rows = dispatch.decode_rows(own, spec.format, index_N, spec.cols)
    for transform, state in reversed(list(zip(spec.transforms, states))):
        if isinstance(transform, HadamardSpec):  # the inverse is the transpose
            rows = dispatch.transform(rows, transform, state, "output")
        else:
            rows = transform.inverse(rows, state)
    return rows
