"""The results table of README.md, from the JSON that the sweeps wrote:

python benchmarks/readme_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from places import HERE

SWEEPS = {"attention": "attention", "forward_backward": "forward + backward", "train_step": "training step"}
CASES = (("two_pass", "cascade"), ("one_pass",))
"""What the two columns of a row show; attention alone has one way to share."""


def main() -> None:
    print("\n".join(table(HERE / "results")))


def table(results: Path) -> list[str]:
    """Markdown lines."""
    lines = [
        "| what | workload | `two_pass` | `one_pass` | ideal | efficiency | bar |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, title in SWEEPS.items():
        for row in json.loads((results / f"{name}.json").read_text())["comparisons"]:
            lines.append(_line(title, row))
            title = ""
    return lines


def _line(title: str, row: dict[str, Any]) -> str:
    by_name = {result["name"]: result for result in row["results"]}
    shown = [next((by_name[name] for name in names if name in by_name), None) for names in CASES]
    measured = [result for result in shown if result is not None]
    speedups = [f"{result['speedup']['median']:.2f}x" if result else "" for result in shown]
    # Both modes do the same work, to the rounding of the table.
    ideal = f"{measured[0]['ideal']:.2f}x"
    efficiency = ", ".join(f"{result['efficiency']['median']:.2f}" for result in measured)
    verdicts = ", ".join(dict.fromkeys(row["verdicts"][result["name"]] for result in measured))
    bar = f"{row['bar']:.2f}: {verdicts}" if row["bar"] is not None else ""
    return f"| {title} | {row['name']} | {speedups[0]} | {speedups[1]} | {ideal} | {efficiency} | {bar} |"


if __name__ == "__main__":
    main()
