"""Measured speeds as rows to print."""

from vqllm.core.protocols import JSON


def speed_rows(results: JSON) -> list[tuple[str, str]]:
    """Label and value of what `vqllm.evaluation.speed.bench` measured of whole models."""
    load = results["load"]
    rows = [
        (
            "measured",
            f"{load['batch']} x {load['prompt_tokens']} tokens of prompt, {load['new_tokens']} "
            f"new, {load['rounds']} rounds; {results['device']}, {results['dtype']}, "
            f"{results['threads']} threads",
        )
    ]
    # "kept" are the copies that the runtime holds beside the stored tensors to be fast.
    for name, figures in results["models"].items():
        stored, kept = figures["weight_bytes"]["stored"], figures["weight_bytes"]["kept"]
        spread = figures["spread"]
        rows += [
            (
                f"{name}: prefill",
                f"{figures['prefill_tokens_per_s']:.1f} tokens/s (spread {spread['prefill']:.2f})",
            ),
            (
                f"{name}: decoding",
                f"{figures['decode_tokens_per_s']:.2f} tokens/s (spread {spread['decode']:.2f})",
            ),
            (
                f"{name}: weights",
                f"{stored / 1e6:.1f} MB" + (f" and {kept / 1e6:.1f} MB kept" if kept else ""),
            ),
        ]
        rows += [
            (f"{name}: prompt of {length}", f"{rate:.1f} tokens/s")
            for length, rate in figures["prompt_tokens_per_s"].items()
        ]
        if resident := figures.get("resident_bytes"):
            megabytes = {key: f"{value / 1e6:.0f} MB" for key, value in resident.items()}
            rows.append(
                (
                    f"{name}: resident memory",
                    f"{megabytes['loaded']} loaded, {megabytes['generated']} after 32 tokens "
                    f"(imports {megabytes['imports']})",
                )
            )
    rows += [
        (f"{name}: model / original", f"{ratio:.2f}") for name, ratio in results["ratios"].items()
    ]
    return rows


def kinds(results: JSON) -> list[tuple[str, ...]]:
    """The table of linears, a row for every kind."""
    return [
        (
            f"{row['number']} x {row['rows']} x {row['cols']}",
            _format(row["format"]),
            row["decode"],
            f"{row['us']:.1f}",
            f"{row['dense_us']:.1f}",
            row["prefill"],
        )
        for row in results["linears"]
    ]


def _format(values: JSON) -> str:
    rest = {k: v for k, v in values.items() if k not in ("format", "stages") and v is not None}
    if "stages" in values:
        rest["stages"] = " + ".join(str(stage["format"]) for stage in values["stages"])
    if "tile_bits" in rest:
        rest = {"code": rest["code"], "bits": rest["tile_bits"] / 256, "L": rest["state_bits"]}
    return " ".join([values["format"], *(f"{key}={value}" for key, value in rest.items())])
