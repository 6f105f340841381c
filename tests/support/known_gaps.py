"""Model types on which something is not there yet; their tests run and may fail."""

import pytest

SHARE = "shared experts, routers or rows that nothing reads are a large part of so small a model"
NAMES = "transformers' rules leave no name for a few of its linears, which stay as they are"

FILES = ("test_mixtures.py", "test_conversions.py", "test_heads.py")

IN_TESTS = {
    "test_nearly_all_weights_of_the_layers_are_quantized": dict.fromkeys(
        (
            "deepseek_v4",
            "ernie4_5_vl_moe",
            "glm5_next",
            "inkling_mm_model",
            "inkling_text",
            "longcat_flash",
            "zaya",
        ),
        SHARE,
    ),
    "test_it_generates_what_the_dense_folder_does": {
        "qwen3_omni_moe_thinker": "transformers' generate asks its config for a key that it lacks"
    },
    "test_names_in_the_files_come_back_to_the_module": dict.fromkeys(
        ("inkling2", "inkling2_text"), NAMES
    ),
}


def mark(items: list[pytest.Item]) -> None:
    """Mark the tests that these gaps concern as expected to fail."""
    for item in items:
        name = getattr(item, "originalname", "")
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        gaps = IN_TESTS.get(name, {})
        for value in values:
            if isinstance(value, str) and value in gaps and item.path.name in FILES:
                item.add_marker(pytest.mark.xfail(reason=gaps[value], strict=False))
