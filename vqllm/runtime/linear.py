"""A linear layer whose weights stay packed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqllm.core.tensors import frozen
from vqllm.runtime.cache import weight_cache
from vqllm.runtime.joined_linears import JoinedLinears
from vqllm.runtime.packed import PackedModule
from vqllm.runtime.packed_products import PackedProducts, serve
from vqllm_kernels import dispatch
from vqllm_kernels.linear import LinearSpec


class VQLinear(PackedModule, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """y = x Wᵀ + bias with W packed as `spec` says.

    It is an `nn.Linear` to code that looks for linears, as adapters (LoRA) do.

    A cast such as `.to(dtype)` or `.half()` changes the bias only.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        spec: LinearSpec,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> None:
        """An empty linear.

        Args:
            spec: what is packed, and how.
            bias: whether there is one, of shape [rows].
            dtype: the dtype of the bias and, to code that asks, of the weight.
            device: where the tensors are made; "meta" waits for a loader to fill them.
        """
        super().__init__(spec, dtype, device)
        self.in_features, self.out_features = spec.cols, spec.rows
        self._group: JoinedLinears | None = None
        self.products = PackedProducts([self])
        self.register_parameter(
            "bias", frozen(torch.empty(spec.rows, dtype=dtype, device=device)) if bias else None
        )

    @classmethod
    def from_tensors(
        cls,
        spec: LinearSpec,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> "VQLinear":
        """A linear with its packed tensors. ValueError if they are not those of `spec`."""
        linear = cls(spec, bias is not None, dtype).fill(tensors)
        if bias is not None:
            linear.bias = frozen(bias)
        return linear

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """y [..., out_features] of x [..., in_features], in the dtype of x."""
        if self._group is not None:
            y = self._group.output(self, x)
            if y is not None:
                return y
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """The same, without regard to the linears that share its input."""
        ys = self.products.again(x)
        if ys is not None:
            if not self.products.have_bias or self.bias is None:
                return ys[0]
            return ys[0] + self.bias.to(x.dtype)
        if not self.is_faster_packed(x):
            W_RC = self._kept_weights(x.dtype)
            if W_RC is not None:
                bias = None if self.bias is None else self.bias.to(x.dtype)
                return F.linear(x, W_RC, bias)
        return self.packed_product(x)

    def join(self, group: JoinedLinears | None) -> None:
        """Be multiplied together with the linears of this group, or alone."""
        self._group = group

    @property
    def group(self) -> JoinedLinears | None:
        """The linears of its input that it is multiplied with."""
        return self._group

    def is_faster_packed(self, x: Tensor) -> bool:
        """Whether x is multiplied with the packed tensors, whether weights are kept or not.

        The gradient of x takes decoded weights: where it is wanted, they are kept.
        """
        if x.requires_grad and torch.is_grad_enabled():
            return False
        return self.beats_kept_weights(x.device, x.numel() // self.in_features, x.dtype)

    def beats_kept_weights(
        self, device: torch.device, num_rows: int, dtype: torch.dtype | None = None
    ) -> bool:
        """The same of so many rows of activations, in the dtype of the model if none is named."""
        dtype = dtype or self._dtype
        return weight_cache() != "on" and dispatch.beats_kept_weights(
            self.spec, device, num_rows, dtype
        )

    def packed_product(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias from the packed tensors, whatever the weight cache is set to."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if serve((self,), x):
            ys = self.products((self,), x)
            if ys is not None:
                return ys[0] if bias is None else ys[0] + bias
        return dispatch.linear(x, self.packed, self.spec, bias)

    def forget(self) -> None:
        """Drop the decoded weights, those of the group included."""
        super().forget()
        if self._group is not None:
            self._group.forget()

    def __getstate__(self) -> dict[str, Any]:
        # A group knows the modules themselves, which a copy does not belong to.
        return {**super().__getstate__(), "_group": None, "products": None}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.products = PackedProducts([self])

    def extra_repr(self) -> str:
        transforms = ", ".join(f"{t.kind} {t.side}" for t in self.spec.transforms) or "none"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.spec.format.format_id}, "
            f"transforms={transforms}"
        )
