"""The file of results of `expert_hessians.py`, and the tables of docs/log.md made of it."""

import json

from vqllm.core.protocols import JSON


def summary(rows: list[JSON]) -> list[JSON]:
    """Means over experts, all and by terciles of their number of own tokens."""
    result = []
    for kind in dict.fromkeys(row["linears"] for row in rows):
        own = sorted(
            (row for row in rows if row["linears"] == kind), key=lambda row: row["own_tokens"]
        )
        third = len(own) // 3
        of = {
            "all": own,
            "rare": own[:third],
            "middle": own[third:-third],
            "frequent": own[-third:],
        }
        means = {
            part: sum(row["own_tokens"] for row in some) / len(some) for part, some in of.items()
        }
        about = {"tokens": own[0]["tokens"], "linears": kind, "experts": len(own)}
        about["own_tokens"] = {part: round(mean, 1) for part, mean in means.items()}
        about["errors"] = {
            name: [
                round(sum(row["errors"][name] for row in some) / len(some), 5)
                for some in of.values()
            ]
            for name in own[0]["errors"]
        }
        result.append(about)
    return result


def written(found: JSON) -> str:
    """A line for each row of the models and each H of the errors."""
    models = ",\n".join(json.dumps(row, ensure_ascii=False) for row in found["models"])
    errors = []
    for row in found["errors"]:
        lines = (f"  {json.dumps(k, ensure_ascii=False)}: {v}" for k, v in row["errors"].items())
        about = json.dumps({k: v for k, v in row.items() if k != "errors"})
        errors.append(about[:-1] + ', "errors": {\n' + ",\n".join(lines) + "\n}}")
    return '{"errors": [\n' + ",\n".join(errors) + '\n], "models": [\n' + models + "\n]}\n"


def error_table(rows: list[JSON]) -> str:
    """Weights p²: a line for each H, columns for kinds and tokens."""
    names = sorted({name for row in rows for name in row["errors"] if keep(name)}, key=_order)
    head = [f"{row['linears'].split()[0]}, {row['own_tokens']['all']:.0f}" for row in rows]
    lines = [["H", "m", *head], ["---"] * 2 + ["---:"] * len(rows)]
    for name in names:
        weights, target, m = name.split(" | ")
        cells = []
        for row in rows:
            found = row["errors"].get(name)
            cells.append(f"{found[0]:.4f} / {found[1]:.4f}" if found else "")
        lines.append([target if weights == "p²" else f"{target}, weight {weights}", m, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _order(name: str) -> tuple[str, str, str]:
    weights, target, m = name.split(" | ")
    return target, m or "alone", weights


def keep(name: str) -> bool:
    """What the table has of all that was measured."""
    weights, target, m = name.split(" | ")
    if target in ("own", "identity"):
        return m in ("", "0.25") and (target, m, weights) != ("identity", "", "1")
    return weights == "p²" and (m in ("", "0.5") or (m == "1.0" and "1/4" in target))


def model_table(rows: list[JSON]) -> str:
    """KL by plan and tokens, mean over draws."""
    tokens = sorted({row["tokens"] for row in rows})
    lines = [["gate and up; down", *map(str, tokens)], ["---"] + ["---:"] * len(tokens)]
    for plan in dict.fromkeys(row["plan"] for row in rows):
        cells = []
        for num in tokens:
            kl = [row["kl"] for row in rows if (row["plan"], row["tokens"]) == (plan, num)]
            cells.append(f"{sum(kl) / len(kl):.4f}" if kl else "")
        lines.append([", ".join(part for part in plan.split(" | ") if part), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
