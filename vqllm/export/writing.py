"""The GGUF file with new codes for some tensors of another one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from vqllm.export.ends import EMBEDDING, HEAD, ROWS, round_rows
from vqllm.export.native_types import NativeType, type_for, type_of

ENDS = (EMBEDDING, HEAD)
"""The embedding and the output head."""
OUTSIDE = "Q6_K"
"""Of both, as llama-quantize has the head; Q8_0 where it must be."""

FILE_TYPES = {"Q2_K": "Q2_K", "Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}
"""Names of whole files in llama.cpp, where they are not those of the type."""


def write(
    reader: Any,
    coded: Mapping[str, tuple[NativeType, Path]],
    outside: Mapping[str, NativeType],
    hessians: Mapping[str, Tensor],
    main: str,
    path: Path,
) -> None:
    """Write a file with the metadata and all tensors of another one.

    Args:
        reader: `gguf.GGUFReader` of the other file.
        coded: type and blocks (`.npy`, uint8 [R, bytes of a row]) of the tensors that are new.
        outside: types of the embedding and the head, by tensor; one that has its type already, or
            none here, stays as it is.
        hessians: of those that are not rounded to nearest.
        main: the type that the file is named after.
        path: of the new file.
    """
    writer = _with_metadata(reader, main, path)
    for tensor in reader.tensors:
        if tensor.name in coded:
            native, file = coded[tensor.name]
            blocks = np.load(file, mmap_mode="r")
            writer.add_tensor(tensor.name, blocks, raw_dtype=_number(native))
        elif (native := outside.get(tensor.name)) and native.name != tensor.tensor_type.name:
            blocks = _blocks(tensor, native, hessians.get(tensor.name))
            writer.add_tensor(tensor.name, blocks, raw_dtype=_number(native))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _with_metadata(reader: Any, main: str, path: Path) -> gguf.GGUFWriter:
    """A writer of a file with the metadata of another one, to which tensors are added."""
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in OWN_FIELDS:
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{FILE_TYPES.get(main, main)}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def head_bytes(reader: Any, main: str, path: Path) -> int:
    """Bytes of a new file before its first tensor, which do not depend on the types of tensors.
    Writes and removes a file without tensors."""
    writer = _with_metadata(reader, main, path)
    for own in reader.tensors:
        writer.add_tensor_info(
            own.name, own.data.shape, own.data.dtype, own.n_bytes, own.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = path.stat().st_size
    path.unlink()
    return size


OWN_FIELDS = ("general.architecture", "general.file_type", "general.quantization_version")


def _number(native: NativeType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[native.name]


def outside_types(reader: Any) -> dict[str, NativeType]:
    """The types of an embedding and a head that are not quantized yet, by tensor, if nothing else
    is said."""
    found = {}
    for tensor in reader.tensors:
        dense = tensor.tensor_type.name in ("F32", "F16", "BF16")
        native = type_for(type_of(OUTSIDE), int(tensor.shape[0]))
        if dense and tensor.name in ENDS and native is not None:
            found[tensor.name] = native
    return found


def _blocks(tensor: Any, native: NativeType, H_CC: Tensor | None) -> np.ndarray[Any, Any]:
    """The blocks of a tensor outside the layers, some rows at a time."""
    parts = []
    for start in range(0, len(tensor.data), ROWS):
        rows = gguf.dequantize(tensor.data[start : start + ROWS], tensor.tensor_type)
        W_RC = torch.from_numpy(rows.copy())
        parts.append(round_rows(native, W_RC, H_CC).blocks_RB.cpu().numpy())
    return np.concatenate(parts)
