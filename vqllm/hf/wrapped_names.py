"""Tensors that have more in their names than the model: saved from a wrapper around it.

torch.compile, DistributedDataParallel, FSDP and PEFT put a module of theirs around the model or
around parts of it, and save its name too: `_orig_mod.model.norm.weight`.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel or DeepSpeed",
    "_forward_module": "Lightning Fabric",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "language_model": "a multimodal model",
    "text_model": "a multimodal model",
}
"""Names of modules, and whose they are."""

RENAMES = """
import json, pathlib
from safetensors.torch import load, save_file
new = lambda name: name{removed}
for file in pathlib.Path({folder!r}).glob("*.safetensors"):
    tensors = load(file.read_bytes()).items()
    save_file({{new(name): t.contiguous() for name, t in tensors}}, file, {{"format": "pt"}})
for file in pathlib.Path({folder!r}).glob("*.index.json"):
    index = json.loads(file.read_text())
    index["weight_map"] = {{new(name): shard for name, shard in index["weight_map"].items()}}
    file.write_text(json.dumps(index))
"""


def explanation(folder: Path, missing: Collection[str], stored: Collection[str]) -> str:
    """What to do where missing tensors are in the files of a wrapper; "" where they are not.

    Args:
        missing: names of tensors of the model.
        stored: names of tensors in the files that the model does not have.
    """
    if adapter := [name for name in stored if ".lora_" in name]:
        return (
            f"It was saved from PEFT's wrapper, with an adapter beside the weights ({min(adapter)})"
            ": load the adapter on its model, merge_and_unload, and save_pretrained the result."
        )
    parts = added_parts(missing, stored)
    if not parts:
        return ""
    segments = [segment for part in parts for segment in part.split(".") if segment]
    owners = dict.fromkeys(WRAPPERS[segment] for segment in segments if segment in WRAPPERS)
    by = f" that {' and '.join(owners)} adds" if owners else ""
    added = " and ".join(f"`{part}`" for part in parts)
    removed = "".join(f'.replace("{part}", "", 1)' for part in parts)
    code = RENAMES.format(removed=removed, folder=str(folder)).strip()
    return (
        f"They are there with {added} in their names{by}, such as {min(stored)}. Save the module "
        f"inside the wrapper again with save_pretrained, or take this out of the names:\n\n{code}"
    )


def added_parts(missing: Collection[str], stored: Collection[str]) -> tuple[str, ...]:
    """What has to be taken out of stored names so that all missing tensors are there, such as
    `("_orig_mod.",)`; () if nothing does that. Arguments as of `explanation`."""
    # The name with most parts is the least likely to be a part of another one by chance.
    probe = max(missing, key=lambda name: (name.count("."), name))
    for name in sorted(stored):
        parts = _added(probe, name)
        if not parts or any(char.isdigit() for part in parts for char in part):  # a layer, a list
            continue
        same = {without(other, parts) for other in stored}
        everywhere = all(all(part in other for part in parts) for other in stored)
        if set(missing) <= same and (everywhere or name.startswith(parts)):
            return parts
    return ()


def without(name: str, parts: Sequence[str]) -> str:
    """A name with each of these parts taken out once."""
    for part in parts:
        name = name.replace(part, "", 1)
    return name


def _added(name: str, stored: str) -> tuple[str, ...]:
    """The parts that a stored name has more than a name, each with its dots; () if it is not the
    name with something added."""
    if stored.endswith(f".{name}"):
        return (stored.removesuffix(name),)
    parts: list[str] = []
    rest = name.split(".")
    inside = False
    for segment in stored.split("."):
        if rest and segment == rest[0]:
            rest, inside = rest[1:], False
            continue
        if inside:
            parts[-1] += f"{segment}."
        else:
            parts.append(f"{segment}.")
        inside = True
    return () if rest else tuple(parts)
