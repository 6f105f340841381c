"""In place of the configuration, for a vLLM whose interface is another."""

from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vqllm.integrations.vllm.refusals import unfit_vllm


def config_that_refuses(problem: Exception) -> type:
    """A class that vLLM takes for a configuration and that refuses to become one."""

    class Unfit(QuantizationConfig):
        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            raise unfit_vllm(problem)

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

    return Unfit
