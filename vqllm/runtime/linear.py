"""A linear layer whose weights stay packed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqllm.runtime import cache
from vqllm_kernels import dispatch, layout
from vqllm_kernels.linear import LinearSpec


class VQLinear(nn.Module):
    """y = x Wᵀ + bias with W packed as `spec` says.

    The packed tensors are parameters (accelerate moves parameters when it offloads, buffers stay
    behind) under the names of `spec.layout()`, and need no gradient. Their dtypes belong to the
    format: `.to(dtype)`, `.half()` and the like change the bias only.
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
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.cols, spec.rows
        self._dtype = dtype
        for name, tensor in spec.layout().items():
            self.register_parameter(
                name, _frozen(torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
            )
        self.register_parameter(
            "bias", _frozen(torch.empty(spec.rows, dtype=dtype, device=device)) if bias else None
        )
        self._packed_names = list(spec.layout())
        self._format_names = list(spec.format.layout(spec.rows, spec.cols))
        self._transform_names = [
            {name: f"t{i}_{name}" for name in transform.layout()}
            for i, transform in enumerate(spec.transforms)
        ]
        self._dense: Tensor | None = None
        self._dense_key: tuple[object, ...] = ()

    @classmethod
    def from_tensors(
        cls,
        spec: LinearSpec,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> "VQLinear":
        """A linear with its packed tensors. ValueError if they are not those of `spec`."""
        layout.check(dict(tensors), spec.layout(), "packed tensors")
        linear = cls(spec, bias is not None, dtype)
        for name, tensor in tensors.items():
            linear.register_parameter(name, _frozen(tensor))
        if bias is not None:
            linear.bias = _frozen(bias)
        return linear

    @property
    def weight(self) -> Tensor:
        """A stand-in on the meta device, for model code that asks for shape or dtype."""
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")

    @property
    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return {name: getattr(self, name) for name in self._packed_names}

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] of x [..., in_features], in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        W_RC = self._kept_weights(x.dtype)
        if W_RC is not None:
            return F.linear(x, W_RC, bias)
        y = self.packed_product(x)
        return y if bias is None else y + bias

    def packed_product(self, x: Tensor) -> Tensor:
        """x Wᵀ from the packed tensors, whatever the weight cache is set to; no bias."""
        transforms = list(zip(self.spec.transforms, self._transform_names))
        for transform, names in transforms:
            if transform.side == "in":
                x = dispatch.transform(x, transform, self._own(names), "input")
        own = {name: getattr(self, name) for name in self._format_names}
        y = dispatch.matmul(x, own, self.spec.format, self.spec.rows, self.spec.cols)
        for transform, names in reversed(transforms):
            if transform.side == "out":
                y = dispatch.transform(y, transform, self._own(names), "output")
        return y

    def _own(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        return {name: getattr(self, full) for name, full in names.items()}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weights [out_features, in_features] in the model's own basis.

        Args:
            dtype: what they are rounded to, once, from float32; None is the dtype of the model.
        """
        return self.spec.dequantize(self.packed).to(dtype or self._dtype)

    def is_offloaded(self) -> bool:
        """Whether accelerate moves the tensors in and out at every call."""
        hook = getattr(self, "_hf_hook", None)
        return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are; "meta" while they are offloaded."""
        return getattr(self, self._packed_names[0]).device

    def keeps_weights(self) -> bool:
        """Whether the decoded weights are kept from one call to the next."""
        return cache.keeps_weights(self.device) and not self.is_offloaded()

    def _kept_weights(self, dtype: torch.dtype) -> Tensor | None:
        if torch.compiler.is_compiling():
            # A graph takes what an earlier call decoded; keeping something new would break it.
            return self._dense if self._dense is not None and self._dense.dtype == dtype else None
        if not self.keeps_weights():
            self._dense = None
            return None
        # The address and version of each packed tensor tell a replaced or overwritten one.
        key = (dtype, *((t.data_ptr(), _version(t)) for t in self.packed.values()))
        if self._dense is None or key != self._dense_key:
            cache.tell_once(dtype)
            # What is decoded in inference mode could never be used with gradients.
            with torch.inference_mode(False), torch.no_grad():
                self._dense, self._dense_key = self.dequantize(dtype), key
        return self._dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VQLinear":
        packed = {id(tensor) for tensor in self.packed.values()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if id(tensor) in packed and changed.dtype != tensor.dtype:
                return tensor.to(changed.device)
            return changed

        super()._apply(keep_dtype, recurse)
        self._dense = None
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense": None, "_dense_key": ()}

    def extra_repr(self) -> str:
        transforms = ", ".join(f"{t.kind} {t.side}" for t in self.spec.transforms) or "none"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.spec.format.format_id}, "
            f"transforms={transforms}"
        )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
