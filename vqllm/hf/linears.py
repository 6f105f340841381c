"""Which modules of a model are linears or embeddings that can be replaced by a quantized one."""

import contextlib
import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes x·Wᵀ + b and nothing else.

    A subclass of `nn.Linear` with a forward of its own (Falcon's computes the same in two steps,
    BitNet's rounds) is tested: a copy of the module with a weight of 2 x 3 must give the result of
    a linear. Double precision, where two orders of addition differ by 1e-16.
    """
    if type(module) is nn.Linear or not isinstance(module, nn.Linear):
        return type(module) is nn.Linear
    if type(module).forward is nn.Linear.forward:
        return True
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    # A copy that shares all but the parameters, which are small random ones.
    weight, x = random(2, 3), random(4, 3)
    bias = None if module.bias is None else random(2)
    probe = copy.copy(module)
    values = {"weight": weight, "bias": bias}
    probe.__dict__["_parameters"] = {
        name: None if value is None else nn.Parameter(value, requires_grad=False)
        for name, value in values.items()
    }
    probe.in_features, probe.out_features = 3, 2
    try:
        # The class's forward: the instance's own may be a loader's, bound to the real weights.
        y = type(module).forward(probe, x)
        return torch.allclose(y, F.linear(x, weight, bias), rtol=0, atol=1e-12)
    except Exception:  # a forward that wants anything else is not that of a linear
        return False


def why_not_embedding(module: nn.Module) -> str | None:
    """Why a module cannot be replaced by packed rows that are decoded on look-up; None if it can.

    It can if it looks up a row of its weight for every token, and does nothing else or something to
    the looked-up rows alone (Gemma's scales them). Tested on a copy with 5 random rows.
    """
    kind = type(module).__name__
    if not isinstance(module, nn.Embedding):
        return f"{kind} is no torch.nn.Embedding"
    if module.max_norm is not None:
        return f"{kind} has max_norm, which changes its weights whenever they are used"
    others = sorted(module.state_dict().keys() - {"weight"})
    if others:
        return f"{kind} has tensors beside its weight: {', '.join(others)}"
    if type(module).forward is nn.Embedding.forward or _looks_up_rows(module):
        return None
    return f"{kind} does more than look up rows and work on each of them"


def _looks_up_rows(module: nn.Embedding) -> bool:
    """Whether `after_lookup` of the module, given rows, returns what the module itself does."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    weight = random(5, module.embedding_dim)
    tokens = torch.tensor([[1, 4, 4], [0, 2, 1]], device="cpu")
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    # Their values may be on the meta device. What holds for any values holds for theirs.
    probe.__dict__["_buffers"] = {
        name: random(*buffer.shape) if buffer.is_floating_point() else buffer
        for name, buffer in module.named_buffers(recurse=False)
    }
    probe.num_embeddings, probe.padding_idx = len(weight), None
    try:
        # The class's forward: the instance's own may be a loader's, bound to the real weights.
        wanted = type(module).forward(probe, tokens)
        rest = after_lookup(probe)
        return rest is not None and torch.allclose(
            type(rest).forward(rest, weight[tokens]), wanted, rtol=0, atol=1e-12
        )
    except Exception:  # a forward that wants anything else is not that of an embedding
        return False


class AfterLookup(nn.Embedding):
    """A base class between a subclass of `nn.Embedding` and `nn.Embedding` itself: its look-up
    returns its input, so that the subclass works on rows that were looked up elsewhere.

    It has no weight. Code that reads `weight` gets an empty tensor of the right dtype.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return torch.empty(0, self.embedding_dim, dtype=self._dtype, device="meta")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def __reduce__(self) -> Any:
        return _after_lookup_of, (type(self).__bases__[0],), self.__dict__


def after_lookup(module: nn.Embedding) -> AfterLookup | None:
    """The work of an embedding's subclass on the rows that it has looked up, as a module that takes
    rows; None for `nn.Embedding` itself.

    It is a copy of the module without its weight, of the same class, so that whatever recognises
    that class (transformers sets the scale of Gemma's) still does.
    """
    if type(module).forward is nn.Embedding.forward:
        return None
    rest = _after_lookup_of(type(module))
    rest.__dict__.update(module.__dict__)
    rest.__dict__["_parameters"] = {}
    rest.padding_idx = None
    rest._dtype = module.weight.dtype
    return rest


def before_lookup(rest: AfterLookup, weight: nn.Parameter) -> nn.Embedding:
    """The embedding with this weight that `after_lookup` was made of."""
    cls: Any = type(rest).__bases__[0]
    module = cls.__new__(cls)
    module.__dict__.update(rest.__dict__)
    module.__dict__["_parameters"] = {"weight": weight}
    return module


def _after_lookup_of(cls: Any) -> AfterLookup:
    kind: Any = type(f"AfterLookup{cls.__name__}", (cls, AfterLookup), {})
    return kind.__new__(kind)


def shared_modules(model: nn.Module, layers: Collection[str]) -> set[nn.Module]:
    """The modules with tensors that several layers use, or a layer and a part outside the layers.

    They are not quantized: when the first layer is quantized, their inputs in a later layer are not
    known yet.
    """
    # With remove_duplicate=False a shared module comes once for each place where it is used. Tied
    # parameters of different modules are shared as well.
    homes: dict[nn.Module | nn.Parameter, set[str]] = {}
    inside = tuple(f"{layer}." for layer in layers)
    for name, module in model.named_modules(remove_duplicate=False):
        home = ""
        if name.startswith(inside):
            home = next(layer for layer in layers if name.startswith(f"{layer}."))
        parameters = list(module.parameters(recurse=False))
        if parameters or any(True for _ in module.buffers(recurse=False)):
            for shared in (module, *parameters):
                homes.setdefault(shared, set()).add(home)
    several = {shared for shared, places in homes.items() if len(places) > 1}
    return {
        module
        for module in model.modules()
        if module in several or not several.isdisjoint(module.parameters(recurse=False))
    }


def capture_inputs(
    linears: Mapping[str, Any], visit: Callable[[str, Tensor], None]
) -> contextlib.ExitStack:
    """Call `visit(name, x)` with the input of each of these modules whenever it runs, until
    closed."""
    stack = contextlib.ExitStack()
    for name, linear in linears.items():

        def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            visit(name, args[0])

        stack.callback(linear.register_forward_pre_hook(hook).remove)
    return stack


def decoder_name(model: nn.Module) -> str:
    """Full name of the text decoder inside a model, "" for the model itself."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore
    return next((name for name, module in model.named_modules() if module is decoder), "")
