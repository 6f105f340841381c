"""`weight` of a module whose matrix is packed: a tensor that is decoded when it is used."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from vqllm.errors import PackedWeightError

aten: Any = torch.ops.aten

WITHOUT_VALUES = frozenset(
    {
        aten.empty_like.default,
        aten.full_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
        aten.new_full.default,
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.ones_like.default,
        aten.rand_like.default,
        aten.randn_like.default,
        aten.zeros_like.default,
    }
)
"""Operators that read dtype, device and shape only."""


class PackedWeight(Tensor):
    """The dense weights of a packed module, or a view of them, for reading.

    It tells dtype, device and shape and holds no values. An operator that takes it gets the decoded
    weights: those that the module keeps, if it keeps any, otherwise decoded for this one call. So a
    product with it equals that of `module.dequantize()` also in a later backward pass, and needs no
    memory between the two.

    What would change it raises `PackedWeightError`, as does what asks for its memory, and any use
    of its values while they are offloaded. Copies (`clone`, `deepcopy`, pickled, `numpy`) are
    ordinary tensors.
    """

    _form: Tensor
    _device: torch.device
    _decode: Callable[[], Tensor]
    # What is computed from it is an ordinary tensor.
    __torch_function__: Any = torch._C._disabled_torch_function_impl
    # transformers' initialization of missing weights leaves what has this mark alone.
    _is_hf_initialized = True

    def __new__(
        cls, form: Tensor, device: torch.device, decode: Callable[[], Tensor]
    ) -> "PackedWeight":
        # To torch it is on the meta device, so that it cannot become the data of another tensor
        # (`p.data = weight`), which would then have no memory. It is asked for its device instead,
        # but not in a graph, whose tensors have values of their own and are not asked.
        new: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            form.shape,
            strides=form.stride(),
            storage_offset=form.storage_offset(),
            dtype=form.dtype,
            device=form.device,
            dispatch_device=form.is_meta,
        )
        torch._C._set_throw_on_mutable_data_ptr(new)
        new._form, new._device, new._decode = form, device, decode
        return new

    def __init__(self, form: Tensor, device: torch.device, decode: Callable[[], Tensor]) -> None:
        """A stand-in.

        Args:
            form: with its shape, strides and dtype; on the meta device, or the values themselves.
            device: where the module is.
            decode: gives the values, of this form, on this device. They are not written into.
        """

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0]._device
        _refuse_writing(func, args, kwargs)
        if _is_view(func) and isinstance(args[0], cls):
            return args[0]._view(func, args[1:], kwargs)
        flat = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        weights = {id(leaf): leaf for leaf in flat if isinstance(leaf, cls)}
        values = {key: weight._operand(func, flat) for key, weight in weights.items()}

        def plain(leaf: Any) -> Any:
            return values.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        result = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        return tree_map(lambda out: _apart(out, values.values()), result)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """What a graph that takes it as an input gets in its place: the values."""
        return ["dense"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: None, shape: Any, strides: Any
    ) -> "PackedWeight":
        values = inner["dense"]
        return PackedWeight(values, values.device, lambda: values)

    @property
    def dense(self) -> Tensor:
        """The values as an ordinary tensor, which is not written into."""
        with torch.no_grad():
            return self._decode()

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """What a function that makes views makes of it: stand-ins for parts of it."""
        forms = func(self._form, *args, **kwargs)
        if isinstance(forms, Tensor):
            made = lambda: func(self._in_own_memory(func), *args, **kwargs)  # noqa: E731
            return type(self)(forms, self._device, made)
        return [
            type(self)(
                form,
                self._device,
                lambda i=i: func(self._in_own_memory(func), *args, **kwargs)[i],
            )
            for i, form in enumerate(forms)
        ]

    def _operand(self, func: Any, operands: list[Tensor]) -> Tensor:
        """The weights for an operator with these tensors among its arguments."""
        if func in WITHOUT_VALUES:
            one = torch.empty((), dtype=self.dtype, device=self._device)
            return one.expand(self.shape)
        if self._device.type != "meta":
            return self._in_own_memory(func)
        others = [operand for operand in operands if not isinstance(operand, PackedWeight)]
        if others and all(other.is_meta for other in others):
            return self._form
        raise PackedWeightError(
            f"{func} needs the values of weights that are offloaded, or not loaded yet. Load the "
            "model without device_map, or read them with vqllm.Checkpoint.open(folder).dense(name)."
        )

    def _in_own_memory(self, func: Any) -> Tensor:
        """The values; where an operator counts places in memory, from the first place on."""
        values = self.dense
        if values.storage_offset() != self._form.storage_offset() and "as_strided" in str(func):
            return values.clone()
        return values

    def _copy(self) -> Tensor:
        """An ordinary tensor with the same values."""
        return self.clone()

    def numpy(self, *, force: bool = False) -> Any:
        array = self._copy().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        return self._copy().tolist()

    def __dlpack__(self, **options: Any) -> Any:
        return self._copy().__dlpack__(**options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self._copy())

    def __reduce_ex__(self, proto: Any) -> Any:
        return self._copy().__reduce_ex__(proto)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PackedWeight({tuple(self.shape)}, dtype={self.dtype}, device='{self._device}')"

    def data_ptr(self) -> int:
        raise _no_memory()

    def storage(self) -> Any:
        raise _no_memory()

    def requires_grad_(self, mode: bool = True) -> "PackedWeight":
        if mode:
            raise _not_trained()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "grad"):
            raise written()
        if name == "_is_param" or (name == "requires_grad" and value):
            raise _not_trained()
        super().__setattr__(name, value)


def _refuse_writing(func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    """Raise PackedWeightError if an operator would write into a stand-in."""
    schema = func._schema.arguments
    given = [*zip(schema, args), *((own, kwargs[own.name]) for own in schema if own.name in kwargs)]
    for argument, value in given:
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        leaves = tree_flatten(value)[0]
        if any(isinstance(leaf, PackedWeight) for leaf in leaves):
            raise written()


def _is_view(func: Any) -> bool:
    """Whether an operator returns views of its first argument."""
    arguments, returns = func._schema.arguments, func._schema.returns
    return bool(
        arguments
        and returns
        and arguments[0].alias_info is not None
        and not arguments[0].alias_info.is_write
        and any(own.alias_info is not None for own in returns)
    )


def _apart(out: Any, values: Any) -> Any:
    """A result that shares no memory with the decoded weights, which a module may keep."""
    if not isinstance(out, Tensor) or out.is_meta or isinstance(out, PackedWeight):
        return out
    memory = out.untyped_storage()._cdata
    if any(own.untyped_storage()._cdata == memory for own in values):
        return out.clone()
    return out


def written() -> PackedWeightError:
    """The error for what would change packed weights as if they were dense."""
    return PackedWeightError(
        "packed weights cannot be written into. To change or merge weights, or to resize a "
        "quantized vocabulary, make the model dense first: model.dequantize(), or `vqllm "
        "dequantize` for a folder; one layer: layer.dequantize() gives its weights as an ordinary "
        "tensor."
    )


def _not_trained() -> PackedWeightError:
    return PackedWeightError(
        "packed weights are no parameter and get no gradient. For a trainable or dense copy: "
        "torch.nn.Parameter(layer.dequantize()); to train a quantized model: LoRA, or `vqllm tune`."
    )


def _no_memory() -> PackedWeightError:
    return PackedWeightError(
        "packed weights have no dense memory to point into: layer.dequantize() gives them as an "
        "ordinary tensor."
    )
