"""The arguments of the public functions as records, and the calls that pages show.

A record has a field for each argument of its function but `progress` and `command`, in the same
order and with the same default. What the arguments mean is said there, in `vqllm.api`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from vqllm.recipes import Recipe, TuningRecipe


@dataclass(frozen=True)
class _Arguments:
    FUNCTION: ClassVar[str]
    """name in `vqllm`"""

    def call(self) -> str:
        """The call of the function as Python text, without what has its default."""
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING:
                shown.append(_text_of(value))
            elif value != field.default:
                shown.append(f"{field.name}={_text_of(value)}")
        return f"vqllm.{self.FUNCTION}({', '.join(shown)})"


@dataclass(frozen=True)
class QuantizeArguments(_Arguments):
    """Those of `vqllm.quantize`."""

    FUNCTION: ClassVar[str] = "quantize"

    model: str | Path
    output: str | Path
    recipe: str | Path | Recipe | None = None
    bits: float | None = None
    size: int | str | None = None
    kl: float | None = None
    preset: str | None = None
    calibration: list[str] | None = None
    seed: int | None = None
    changes: tuple[str, ...] = ()
    device: str | None = None
    compute_dtype: str | None = None
    evaluate: bool = True
    eval_text: str | Path | None = None
    eval_windows: int | None = None
    trust_remote_code: bool = False
    allow_bin: bool = False


@dataclass(frozen=True)
class PlanArguments(_Arguments):
    """Those of `vqllm.plan`."""

    FUNCTION: ClassVar[str] = "plan"

    model: str | Path
    recipe: str | Path | Recipe | None = None
    bits: float | None = None
    size: int | str | None = None
    kl: float | None = None
    preset: str | None = None
    calibration: list[str] | None = None
    seed: int | None = None
    changes: tuple[str, ...] = ()
    device: str | None = None
    compute_dtype: str | None = None
    evaluate: bool = True
    eval_text: str | Path | None = None
    eval_windows: int | None = None
    measure: bool = True
    trust_remote_code: bool = False
    allow_bin: bool = False

    def of_run(self, output: str | Path) -> QuantizeArguments:
        """The arguments of the run that is planned."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        del own["measure"]
        return QuantizeArguments(output=output, **own)


@dataclass(frozen=True)
class TuneArguments(_Arguments):
    """Those of `vqllm.tune`."""

    FUNCTION: ClassVar[str] = "tune"

    checkpoint: str | Path
    output: str | Path
    recipe: str | Path | TuningRecipe = "end-to-end"
    teacher: str | Path | None = None
    calibration: list[str] | None = None
    seed: int | None = None
    time: str | None = None
    changes: tuple[str, ...] = ()
    device: str | None = None
    evaluate: bool = True
    eval_text: str | Path | None = None
    eval_windows: int | None = None
    trust_remote_code: bool = False
    allow_bin: bool = False


@dataclass(frozen=True)
class CompareArguments(_Arguments):
    """Those of `vqllm.compare`; `recipe` is a list of all that were named."""

    FUNCTION: ClassVar[str] = "compare"

    model: str | Path
    output: str | Path
    recipe: list[str | Path | Recipe]
    grid: Mapping[str, Sequence[Any]] | None = None
    changes: tuple[str, ...] = ()
    calibration: list[str] | None = None
    seed: int | None = None
    device: str | None = None
    compute_dtype: str | None = None
    eval_text: str | Path | None = None
    eval_windows: int | None = None
    keep_checkpoints: bool = True
    trust_remote_code: bool = False
    allow_bin: bool = False

    def of_member(
        self, recipe: str | Path | Recipe, changes: tuple[str, ...], output: Path
    ) -> QuantizeArguments:
        """The arguments with which a member would be quantized alone."""
        return QuantizeArguments(
            model=self.model,
            output=output,
            recipe=recipe,
            calibration=self.calibration,
            seed=self.seed,
            changes=changes,
            device=self.device,
            compute_dtype=self.compute_dtype,
            eval_text=self.eval_text,
            eval_windows=self.eval_windows,
            trust_remote_code=self.trust_remote_code,
            allow_bin=self.allow_bin,
        )


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Those of `vqllm.api.export_gguf`."""

    model: str | Path
    output: str | Path
    type: str | None = None
    mix: str | Sequence[str] | None = None
    size: str | int | None = None
    calibration: list[str] | None = None
    sequences: int | None = None
    seed: int = 0
    converter: str | Path | None = None
    device: str | None = None
    compute_dtype: str | None = None
    trust_remote_code: bool = False
    allow_bin: bool = False


def source_names(sources: str | Path | Iterable[str | Path] | None) -> list[str] | None:
    """Calibration sources as recipes have them."""
    if sources is None:
        return None
    one = isinstance(sources, str | Path)
    return [str(source) for source in ([sources] if one else sources)]


def _text_of(value: Any) -> str:
    """An argument as Python text."""
    if isinstance(value, Recipe):
        return f"vqllm.recipe.from_dict({value.to_dict()!r}, {value.name!r})"
    if isinstance(value, list):
        return f"[{', '.join(map(_text_of, value))}]"
    return repr(str(value) if isinstance(value, Path) else value)
