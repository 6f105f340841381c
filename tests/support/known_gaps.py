"""Model types on which something is not there yet; their tests run and may fail."""

import pytest

NAMES = "transformers' rules leave no name for some of its packed tensors"
PARAMETERS = "its experts are looked at as fused parameters while it is loaded"
SHARE = (
    "shared experts, routers, what mixes streams, or rows that nothing reads are a large part of "
    "so small a model"
)
SAVED_DENSE = "saved after it was dequantized at load, its experts are not as its files have them"

FILES = ("test_mixtures.py", "test_conversions.py", "test_heads.py")

EVERYWHERE = {
    "inkling2": NAMES,
    "inkling2_text": NAMES,
    "inkling_mm_model": NAMES,
    "qwen4_exp": PARAMETERS,
    "qwen4_exp_text": PARAMETERS,
    "qwen3_omni_moe_thinker": PARAMETERS,
    "ernie4_5_vl_moe": PARAMETERS,
}
IN_TESTS = {
    "test_nearly_all_weights_of_the_layers_are_quantized": dict.fromkeys(
        ("longcat_flash", "inkling_text", "zaya", "deepseek_v4", "glm5_next"), SHARE
    ),
    "test_dequantized_at_load_it_is_an_ordinary_model": dict.fromkeys(
        (
            "aria_text",
            "aria",
            "granitemoe",
            "granitemoehybrid",
            "granitemoeshared",
            "minimax_m3_vl",
            "step3p7",
        ),
        SAVED_DENSE,
    ),
    "test_names_in_the_files_come_back_to_the_module": dict.fromkeys(
        ("dots3_note", "minimax_m3_vl", "step3p7"), NAMES
    ),
}


def mark(items: list[pytest.Item]) -> None:
    """Mark the tests that these gaps concern as expected to fail."""
    for item in items:
        name = getattr(item, "originalname", "")
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        gaps = {**EVERYWHERE, **IN_TESTS.get(name, {})}
        for value in values:
            if isinstance(value, str) and value in gaps and item.path.name in FILES:
                item.add_marker(pytest.mark.xfail(reason=gaps[value], strict=False))
