"""README's table of peaks and its picture of a step's memory over time, from what `kvpref profile memory` wrote:

    kvpref profile memory benchmarks/llama_128.json game24_groups.jsonl --tokenizer gpt_neox_20b \\
        --num-responses 2,8,32,64 --max-tokens-per-chunk 512 --output memory
    python benchmarks/memory_readme.py memory/memory.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from places import HERE

from kvpref.profiling.memory.plot import plot_timeline, require_matplotlib
from kvpref.profiling.memory.report import format_bytes
from kvpref.profiling.memory.timeline import MemorySnapshot

RESULTS = HERE / "results"
SHOWN = ("full N=64", "bounded N=64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="memory.json in the command's output folder")
    report = json.loads(parser.parse_args().report.read_text())
    draw(report, RESULTS / "memory_timeline.png")
    # The timelines are some megabytes.
    profiles = [{key: value for key, value in row.items() if key != "timeline"} for row in report["profiles"]]
    settings = report["settings"] | {name: Path(report["settings"][name]).name for name in ("model", "data")}
    text = json.dumps(report | {"profiles": profiles, "settings": settings}, indent=1) + "\n"
    (RESULTS / "memory_profile.json").write_text(text)
    print("\n".join(table(RESULTS)))


def table(results: Path) -> list[str]:
    """Markdown lines: a row per variant, a column per number of responses."""
    rows = json.loads((results / "memory_profile.json").read_text())["profiles"]
    counts = sorted({row["num_responses"] for row in rows})
    peaks = {(row["variant"], row["num_responses"]): row["peak"]["total_bytes"] for row in rows}
    lines = [
        f"| peak of a step | {' | '.join(f'N = {count}' for count in counts)} |",
        f"| --- |{' --- |' * len(counts)}",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = " | ".join(format_bytes(peaks[variant, count]) for count in counts)
        lines.append(f"| `{variant}` | {cells} |")
    return lines


def draw(report: dict[str, Any], path: Path) -> None:
    """The timelines of the cases in `SHOWN`, on one scale."""
    require_matplotlib()
    from matplotlib import pyplot

    by_name = {row["name"]: row for row in report["profiles"]}
    figure, axes = pyplot.subplots(1, len(SHOWN), figsize=(12, 4.2), layout="constrained")
    for ax, name in zip(axes, SHOWN, strict=True):
        plot_timeline(ax, _points(by_name[name]["timeline"]))
        ax.set_title(name)
    highest = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(0, highest)
    figure.savefig(path, dpi=110)


def _points(columns: dict[str, Any]) -> list[MemorySnapshot]:
    points = []
    for index, (event, region) in enumerate(zip(columns["event"], columns["region"], strict=True)):
        held = {name: values[index] for name, values in columns["bytes"].items() if values[index]}
        points.append(
            MemorySnapshot(total_bytes=sum(held.values()), bytes_by_category=held, region=region, event=event)
        )
    return points


if __name__ == "__main__":
    main()
