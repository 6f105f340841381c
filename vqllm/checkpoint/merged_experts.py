"""Which linear of the model each stored matrix of one expert is (`experts.3.w1.weight`), where
transformers puts the matrices of all experts together when it loads.
"""

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from vqllm.checkpoint.source import SourceTensors
from vqllm.hf.linear_form import Part


def linears_of_experts(source: SourceTensors) -> dict[str, str]:
    """Names of weights in linear form (`model.layers.0.mlp.experts.3.gate_proj.weight`) by those in
    the files. Matrices that are no linear as they are stored are left out."""
    parts: dict[str, dict[str, Part]] = {}
    for name, part in source.blueprint.parts.items():
        if part.expert is not None and name.endswith(".weight"):
            parts.setdefault(part.tensor, {})[name] = part
    found: dict[str, str] = {}
    for tensor, own in parts.items():
        if tensor in source.blueprint.conversions.origins:
            found |= _of_tensor(source, tensor, own)
    return found


def _of_tensor(source: SourceTensors, tensor: str, parts: dict[str, Part]) -> dict[str, str]:
    conversions = source.blueprint.conversions
    if not conversions.merges_experts(tensor, source.blueprint.shapes[tensor][0]):
        return {}
    origin = conversions.origins[tensor]
    patterns = sorted(set(origin.patterns))

    # The rule itself says where each pattern's matrix goes: it is given matrices of one number.
    def numbered(key: str) -> Tensor:
        number = patterns.index(origin.patterns[origin.keys.index(key)])
        return torch.full((source.shape_in_files(key)[0], 1), float(number))

    whole = conversions.convert(tensor, numbered, only=0)[0]
    places = _places(whole, parts)
    names = {(part.expert, _alone(part)): name for name, part in parts.items()}
    found, numbers = {}, Counter[str]()
    for key, pattern in zip(origin.keys, origin.patterns):
        if place := places.get(patterns.index(pattern)):
            found[key] = names[numbers[pattern], place]
        numbers[pattern] += 1
    return found


def _places(whole: Tensor, parts: dict[str, Part]) -> dict[int, Part]:
    """Where in an expert each number is, if it fills what a linear has of it, not transposed."""
    found = {}
    for part in parts.values():
        if part.expert == 0 and not part.transposed and part.columns is None:
            own = _alone(part).of(whole)
            if own.min() == own.max():
                found[int(own[0, 0])] = _alone(part)
    return found


def _alone(part: Part) -> Part:
    return replace(part, expert=None)
