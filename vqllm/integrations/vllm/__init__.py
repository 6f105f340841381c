"""Quantized folders served by vLLM, found by its plugin mechanism (`vllm.general_plugins`).

vLLM calls `register` in each of its processes. It then knows the method that config.json names and
asks `config.VqllmConfig` what to do for every linear, embedding and group of experts:

    config     what vLLM asks: which module is quantized, what is refused
    linear     linears, alone or fused (q, k, v; gate, up), packed or decoded
    held       what of a linear one process holds, and its products
    embedding  the embedding and the output head, tied or not
    experts    experts that are quantized one by one, decoded or packed
    names      which quantized modules a module of vLLM is made of
    mode       whether a module keeps its weights packed or decodes them at load
    stored     what the loader brings, kept until a module is complete
    packed     packed linears of one input, and their products
    packed_experts  packed experts, and their products
    cuts       some rows or columns of a packed linear, for tensor parallelism
    refusals   what cannot be served, said before weights are read

vLLM is imported by the first five only, and by nothing outside of this folder.
"""

import logging

logger = logging.getLogger(__name__)

METHOD = "vqllm"


def register() -> None:
    """Make vLLM know the format. Idempotent; it never fails, because vLLM calls it whatever the
    model: a vLLM that does not fit is refused when it loads a quantized folder."""
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
    except ImportError as error:
        logger.warning("vqllm: this vLLM takes no other methods of quantization: %s", error)
        return
    try:
        from vqllm.integrations.vllm.config import VqllmConfig as config
    except (ImportError, AttributeError, TypeError) as error:
        from vqllm.integrations.vllm.unfit import config_that_refuses

        config = config_that_refuses(error)
        logger.warning("vqllm: quantized folders cannot be served by this vLLM: %s", error)
    register_quantization_config(METHOD)(config)
