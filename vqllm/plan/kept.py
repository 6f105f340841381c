"""Linears that stay as they are because of what they do: routers, and linears of few rows.

routers    decide which experts run. Codes of 4 bits sent half of the tokens to other experts
           (a random router of 64 x 576, the 8 largest of 64), and a router is small.
few_rows   gates and scores with an output for each head or for a whole token. A tile of codes would
           be mostly padding, and what they decide is worth more than their size.

Both are found by place and shape, on a model that may be on the meta device; a router's name is
asked for last. The recipe's `skip_kinds` says which of the two stay.
"""

from collections import Counter
from collections.abc import Collection, Iterator

from torch import nn

from vqllm.hf.linears import is_linear
from vqllm.recipes import SkippedKind

FEW_ROWS = 64
COLS_A_ROW = 32
"""A linear of few rows has at most `FEW_ROWS`, and at least `COLS_A_ROW` columns for each.

At their real sizes these have at most 64 rows: gates of shared experts (1 x 2048), of xLSTM
(8 x 4096) and Laguna (48 x 2048), decay and beta of gated delta nets (Qwen3.5: 32 x 4096, OLMo:
30 x 3840, Qwen3-Next in one matrix: 64 x 2048), scores of DeepSeek's indexer (64 x 7168). All have
32 columns a row or more. What is an ordinary projection has more rows: Mamba's x_proj (80 x 1536),
low ranks of keys and values (576 x 7168, 160 x 2048), keys of a single head (256 x 2048,
128 x 896). The number of columns tells small models apart: their keys may have 64 rows too, such
as 64 x 576. In the smallest, whole states have so few values; see `_width`."""

IS_ROUTER = "a router, it decides which experts run"
ROUTER = "router"
"""The name of routers wherever they are."""
BESIDE_EXPERTS = (ROUTER, "gate", "wg", "classifier", "switch")
"""Names that only a router has where there are experts beside it."""


def kept_linears(layer: nn.Module, kinds: Collection[SkippedKind]) -> dict[str, str]:
    """A reason for every linear of these kinds in a decoder layer, by its name in the layer."""
    reasons = {}
    if "few_rows" in kinds:
        width = _width(layer)
        for name, linear in _linears(layer):
            if has_few_rows(linear) and linear.out_features < width:
                reasons[name] = f"a linear of few rows ({_size(linear)})"
    if "routers" in kinds:
        for prefix, router in _routers(layer):
            for name, linear in _linears(router, prefix):
                reasons[name] = f"{IS_ROUTER} ({_size(linear)})"
    return reasons


def router_parameters(layer: nn.Module) -> dict[str, str]:
    """A reason for every module of a router that has a matrix of its own and is no linear, by its
    name in the decoder layer."""
    reasons = {}
    for prefix, router in _routers(layer):
        for name, module in router.named_modules(prefix=prefix):
            own = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
            if own and not is_linear(module):
                sizes = ", ".join(" x ".join(map(str, p.shape)) for p in own)
                reasons[name] = f"{IS_ROUTER} ({sizes})"
    return reasons


def has_few_rows(linear: nn.Linear) -> bool:
    """Whether it has as few rows as gates have, for its columns."""
    rows, cols = linear.out_features, linear.in_features
    return rows <= FEW_ROWS and cols >= COLS_A_ROW * rows


def _width(layer: nn.Module) -> int:
    """How many values most linears of a layer read: a state, or more."""
    counts = Counter(linear.in_features for _, linear in _linears(layer))
    return max(counts, key=counts.__getitem__, default=0)


def _routers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Routers by their name in the layer: modules beside experts, and modules of such a name."""
    for prefix, parent in layer.named_modules():
        children = dict(parent.named_children())
        sizes = {name: _expert_counts(name, child) for name, child in children.items()}
        counts = set().union(*sizes.values())
        for name, child in children.items():
            beside = bool(counts) and not sizes[name] and _routes(name, child, counts)
            if beside or (name == ROUTER and not _returns_states(child)):
                yield f"{prefix}.{name}".lstrip("."), child


def _expert_counts(name: str, module: nn.Module) -> set[int]:
    """The numbers that may be that of the experts in a module; empty if it holds none.

    Experts are a list of modules of that name, children "0" to "E-1" of a module that is no list,
    or slices of parameters in a module that knows their number.
    """
    numbered = sum(key.isdecimal() for key, _ in module.named_children())
    if isinstance(module, nn.ModuleList):
        return {numbered} if numbered and name.endswith("experts") else set()
    if isinstance(module, nn.Sequential):
        return set()
    stated = getattr(module, "num_experts", None)
    counts = {stated} if isinstance(stated, int) else set()
    if numbered and (counts or numbered == len(list(module.children()))):
        return {*counts, numbered}
    stacked = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3}
    # The last two are flags that transformers' decorator for experts sets.
    known = counts or name.endswith("experts") or hasattr(module, "has_gate")
    if stacked and (known or hasattr(module, "is_transposed")):
        return counts | stacked
    return counts if name.endswith("experts") else set()


def _routes(name: str, module: nn.Module, counts: Collection[int]) -> bool:
    """Whether a module beside experts of these numbers is their router."""
    linears = [linear for _, linear in _linears(module)]
    if is_linear(module):
        return module.out_features in counts or name in BESIDE_EXPERTS
    if _returns_states(module):
        return False
    return (
        any(linear.out_features in counts for linear in linears)
        or getattr(module, "num_experts", None) in counts
        or name in BESIDE_EXPERTS
    )


def _returns_states(module: nn.Module) -> bool:
    """Whether a module is a block such as attention or shared experts, which returns as many values
    as it takes: a later linear has as many rows as the first one has columns."""
    linears = [linear for _, linear in _linears(module)]
    return any(linear.out_features == linears[0].in_features for linear in linears[1:])


def _linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Linear]]:
    for name, inner in module.named_modules(prefix=prefix):
        if is_linear(inner):
            yield name, inner


def _size(linear: nn.Linear) -> str:
    return f"{linear.out_features} x {linear.in_features}"
