"""Format versions 1 to 3 of a quantized checkpoint: specification, and `quantization_config`.

Version 2 is version 1 with an embedding or an output head among the quantized modules. Version 3 is
version 2 with linears that the model's own class does not have as such, or has under another name.
A writer uses each only where it needs it, so that older readers read all they can.

A checkpoint is an ordinary Hugging Face folder of safetensors and JSON, nothing else.

Files
    config.json                        the source model's, with the key `quantization_config` added
    model-0000i-of-000NN.safetensors   i = 1 ... NN-1: decoder layer i-1; i = NN: everything else
    model.safetensors.index.json       weight_map: {tensor name: file};
                                       metadata.total_size: bytes of all tensors;
                                       metadata.vqllm.sha256: {file: sha256 of the file, hex}
    all others                         of the source, byte for byte but for local paths (tokenizer,
                                       generation_config, ...)

    How tensors are spread over files carries no meaning: a reader follows weight_map, or takes
    `model.safetensors` where there is no index. Copies that transformers writes (save_pretrained)
    have neither the checksums nor the division by layers.

Tensors
    A quantized module M (its full name in the model) has no tensor `M.weight`. It has `M.` + the
    name of each tensor that its specification asks for, and `M.bias`, unchanged, if the source has
    one. Every other tensor has the name, shape and dtype that it has in the source. Tied tensors
    are stored once. Integers are little-endian, as always in safetensors.

    In version 1 every M is a linear of the decoder layers. From version 2 on M may also be the
    model's input embedding (`get_input_embeddings()` of the model) or its output head
    (`get_output_embeddings()`); what kind of module it is, the model tells. Other embeddings, such
    as learned positions, are never quantized.

Linear form (version 3)
    Two kinds of transformers' modules hold matrices in another form than that of a linear. In
    version 3 a reader puts these linears in their place before it looks for modules:

        experts, with the matrices of all experts in one tensor   children "0" to "E-1", each with
                                           linears gate_proj, up_proj, down_proj (or up_proj,
                                           down_proj; or gate_up_proj, down_proj where the outputs
                                           of gate and up take turns), biases with them. All experts
                                           of the model have this form, quantized or not: those
                                           that are not have `weight` and `bias` as linears do
        Conv1D (GPT-2), W stored as [C, R]                a linear; only where it is quantized

    `vqllm.hf.linear_form` says which module becomes what. Names in files are those before
    transformers' renaming: a reader applies the rules that transformers has for the checkpoints of
    the class that it loads, and for a module without the head, or of the text tower alone, leaves
    out what that class does not have. Every other tensor of the source keeps its name in the files.

quantization_config
    quant_method     "vqllm"
    format_version   1, 2 or 3
    specs            {id: {"rows": R, "cols": C, "codec": {...}, "transforms": [...]}}, each
                     distinct one once; an id is a decimal number as a string
    modules          {M: id} for every quantized module, W of R x C (out_features x in_features
                     of a linear, num_embeddings x embedding_dim of an embedding)
    tied             from version 2 on: {head: embedding}, or {} where they are two matrices. A tied
                     head is not among `modules` and has no tensors but its bias; its W is that of
                     the embedding, one of `modules`
    outside_layers   from version 2 on: those of `modules` that are not in the decoder layers, which
                     sizes in bits a weight of the linears leave out
    not_quantized    {module: reason}, optional, for people
    recipe           what the checkpoint was made with, optional, for people
    source           {"model": the original: a hub id, or the name of a folder or file without its
                     place}, optional: the teacher of a later tuning
    tuning           [{"recipe": ..., "teacher": ...}, ...] what was tuned after rounding, in order,
                     optional, for people
    producer         {"vqllm": version}, optional, for people

    Readers keep keys that they do not know, and refuse a larger format_version.

The weights of M
    1.  `codec` has the key "format", a format id, and the fields of that format. It gives names,
        shapes and dtypes of the stored tensors, and W' [R, C] from them. A reader refuses an id
        that it does not know; what stands under an id never changes:

        convolutional-v1  vqllm_kernels.convolutional.reference
        d4-v1             vqllm_kernels.d4.reference
        e8p-v1, e81b-v1   vqllm_kernels.e8p.reference
        grouped-v1        vqllm_kernels.grouped.reference
        leech-v1          vqllm_kernels.leech.reference
        learned-lattice-v1  vqllm_kernels.learned_lattice.reference
        lut-v1            vqllm_kernels.lut.reference
        lut-v2            vqllm_kernels.lut.reference_v2
        pyramid-v1        vqllm_kernels.pyramid.reference
        uniform-v1        vqllm_kernels.uniform.reference
        residual-v1       vqllm_kernels.residual.reference
        sparse-v1         vqllm_kernels.sparse.reference
        split-v1          vqllm_kernels.split.reference
        trellis-v1        vqllm_kernels.trellis.reference
        trellis-v2        vqllm_kernels.trellis.reference_v2
        trellis-v3        vqllm_kernels.trellis.reference_v3

        Codes narrower than a byte are packed as vqllm_kernels.bitpack says: least significant bit
        first, every row padded to a whole byte.
    2.  `transforms`, in the order in which they were applied to W, so that W = T1⁻¹(T2⁻¹(... W')).
        The tensors of transform i (counted from 0) carry the prefix `t{i}_`. Each has the key
        "kind", a side and its options:

        hadamard, scale, coded_scale, permutation, block_diagonal   vqllm_kernels.transforms

    All arithmetic of the definition is float32. A linear computes y = x Wᵀ + bias; equivalently,
    the input-side transforms act on x in their order, then W', then the inverses of the output-side
    transforms in reverse order.

    An embedding looks up rows of W; what its class does to them afterwards (a scale, as in Gemma)
    is that of the model. Its transforms are of the input side only, so that a row of W comes from
    the same row of W', and W' from the stored tensors row by row: a tensor has a first axis that
    runs over the rows of tiles, or does not depend on the number of rows.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from vqllm.errors import CheckpointError
from vqllm_kernels.linear import LinearSpec

JSON = dict[str, Any]

FORMAT_VERSION = 3
"""The newest one; what a checkpoint does not need is not written."""
QUANT_METHOD = "vqllm"

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

RECORDS = "report.jsonl"
"""The report's record of every quantized linear, one a line; no part of the format."""


def shard_name(number: int, total: int) -> str:
    """File name of shard `number`, counted from 1."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """The contents of `quantization_config`.

    `extra` holds keys that this version does not know; they are written back as they came.
    `linear_form` is that of version 3.
    """

    specs: dict[str, JSON]
    modules: dict[str, str]
    tied: dict[str, str] = field(default_factory=dict)
    outside_layers: tuple[str, ...] = ()
    linear_form: bool = False
    format_version: int = 1
    extra: JSON = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        linears: Mapping[str, LinearSpec],
        *,
        outside_layers: Collection[str] = (),
        tied: Mapping[str, str] | None = None,
        linear_form: bool = False,
        recipe: JSON | None = None,
        not_quantized: Mapping[str, str] | None = None,
        producer: JSON | None = None,
        source: JSON | None = None,
    ) -> "QuantizationConfig":
        """Describe quantized modules. Ids depend on the specifications only, not on their order."""
        texts = {name: _canonical(spec) for name, spec in linears.items()}
        ids = {text: str(i) for i, text in enumerate(sorted(set(texts.values())))}
        optional = {
            "recipe": recipe,
            "not_quantized": not_quantized,
            "producer": producer,
            "source": source,
        }
        return cls(
            specs={id: json.loads(text) for text, id in ids.items()},
            modules={name: ids[text] for name, text in texts.items()},
            tied=dict(tied or {}),
            outside_layers=tuple(sorted(outside_layers)),
            linear_form=linear_form,
            format_version=3 if linear_form else 2 if outside_layers else 1,
            extra={key: value for key, value in optional.items() if value is not None},
        )

    @classmethod
    def parse(cls, values: JSON, origin: str) -> "QuantizationConfig":
        """Read what `to_dict` wrote.

        Args:
            values: the JSON object under `quantization_config`.
            origin: the file, for messages.

        Raises:
            CheckpointError: another method, a newer format, or contents that do not fit together.
        """
        # Each key that is known is taken out of `rest`; what is left over goes to `extra`.
        rest = dict(values)
        method = rest.pop("quant_method", None)
        if method != QUANT_METHOD:
            raise CheckpointError(
                f"{origin} is quantized by {method!r}, not by {QUANT_METHOD!r}: load it with the "
                "library that made it."
            )
        version = rest.pop("format_version", None)
        if type(version) is not int or version < 1:
            raise CheckpointError(
                f"{origin}: format_version is {version!r}, expected a number from 1 to "
                f"{FORMAT_VERSION}. Get an undamaged copy."
            )
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{origin} has format version {version}; this vqllm reads versions up to "
                f"{FORMAT_VERSION}. Upgrade it: pip install --upgrade vqllm"
            )
        # From here on the format is one that this version knows: anything wrong is damage.
        specs, modules = rest.pop("specs", None), rest.pop("modules", None)
        if not isinstance(specs, dict) or not isinstance(modules, dict):
            raise CheckpointError(
                f"{origin}: `specs` and `modules` must be JSON objects, found "
                f"{type(specs).__name__} and {type(modules).__name__}. Get an undamaged copy."
            )
        if not modules:
            raise CheckpointError(f"{origin}: `modules` is empty. Get an undamaged copy.")
        unknown = sorted(str(id) for id in modules.values() if str(id) not in specs)
        if unknown:
            raise CheckpointError(
                f"{origin}: modules name the specifications {', '.join(unknown)}, which `specs` "
                "does not have. Get an undamaged copy."
            )
        tied, outside = {}, ()
        if version > 1:
            tied, outside = rest.pop("tied", None), rest.pop("outside_layers", None)
            _check_outside(tied, outside, modules, origin)
        return cls(
            specs=specs,
            modules=modules,
            tied=tied,
            outside_layers=tuple(outside),
            linear_form=version > 2,
            format_version=version,
            extra=rest,
        )

    def to_dict(self) -> JSON:
        """The JSON object that stands under `quantization_config`."""
        version_2 = {"tied": self.tied, "outside_layers": list(self.outside_layers)}
        return {
            **self.extra,
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "specs": self.specs,
            "modules": self.modules,
            **(version_2 if self.format_version > 1 else {}),
        }

    def linears(self) -> dict[str, LinearSpec]:
        """The specification of every quantized module by name, without those tied to another.

        Raises:
            CheckpointError: a specification that this version cannot decode.
        """
        built = {id: _linear_spec(id, values) for id, values in self.specs.items()}
        return {name: built[id] for name, id in self.modules.items()}


def spec_to_dict(spec: LinearSpec) -> JSON:
    """The JSON object of a specification, size included."""
    return {"rows": spec.rows, "cols": spec.cols, **spec.to_dict()}


def spec_from_dict(values: JSON) -> LinearSpec:
    """The specification that `spec_to_dict` described. ValueError for anything unknown."""
    for key in ("rows", "cols"):
        if type(values[key]) is not int or values[key] < 1:
            raise ValueError(f"{key} is {values[key]!r}, expected a number of at least 1")
    return LinearSpec.from_dict(values, values["rows"], values["cols"])


def _check_outside(tied: Any, outside: Any, modules: JSON, origin: str) -> None:
    """Raise CheckpointError unless the keys of version 2 fit the quantized modules."""
    right = (
        isinstance(tied, dict)
        and isinstance(outside, list)
        and all(isinstance(name, str) and name in modules for name in [*outside, *tied.values()])
        and not tied.keys() & modules.keys()
    )
    if not right:
        raise CheckpointError(
            f"{origin}: `tied` must be an object and `outside_layers` a list, of names that are "
            "among `modules`. Get an undamaged copy."
        )


def _canonical(spec: LinearSpec) -> str:
    return json.dumps(spec_to_dict(spec), sort_keys=True)


def _linear_spec(id: str, values: JSON) -> LinearSpec:
    try:
        return spec_from_dict(values)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint's layer specification {id!r} cannot be read: {error!r}. A newer vqllm "
            "may know it (pip install --upgrade vqllm); otherwise get an undamaged copy."
        ) from error
