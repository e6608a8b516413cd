"""Write docs/models.md, the table of supported models, from the census's results.

python benchmarks/census_page.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from places import HERE, ROOT

from kvpref.models.families import FAMILIES, REFUSED
from kvpref.models.vision.families import WITHOUT_IMAGES

RESULTS = HERE / "results" / "census.json"
IMAGE_RESULTS = HERE / "results" / "census_images.json"
PAGE = ROOT / "docs" / "models.md"

_INTRODUCTION = """# Models

What kvpref computes exactly, and what it refuses. `make census` writes this page: it builds a tiny random model
of every causal language model that transformers registers, and of variants of some, and compares log-probs and
the gradient of every parameter with the model's own forward on each sequence alone: in modes `two_pass`,
`one_pass` and `packed` and schedule `bounded`, checkpointed and not, in float32 and, where the model runs in
it, float64. Windows hold 5 tokens and chunks 6, so that prompts cross them.

`kvpref check MODEL` says what was found in a model at hand, `kvpref check MODEL --numeric` proves it on its own
weights. A model of a type that is not listed here, such as one with code of its own, is let in by
`kvpref.attach(model, verify=True)` if the same comparison on two short groups finds it equal.
"""


_IMAGES = """## Given images

The same comparison of models that read images, tower and projector included, with groups of 2 and 4 that hold one
image, two of different sizes, none, the image of another group, and another image under the same text; in mode
`padded` too, and in a batch without images. `python benchmarks/census.py --task image` repeats it. A batch that holds
images is refused, by name, for every other model type.
"""


def render(results: list[dict[str, Any]], images: list[dict[str, Any]]) -> str:
    """The page, from the newest release's results and the counts of others."""
    return _of_text(*results) + "\n" + _of_images(*images)


def _of_images(results: dict[str, Any], *others: dict[str, Any]) -> str:
    rows = results["rows"]
    parts = [
        _IMAGES,
        " ".join(map(_counts, (results, *others))) + "\n",
        "| model type | class | variants that were compared too | largest error: log-probs, gradients |\n"
        "| --- | --- | --- | --- |",
    ]
    for name in _exact(results):
        shown = [row for row in rows if row["model"].partition(":")[0] == name]
        variants = ", ".join(row["model"].partition(":")[2] for row in shown[1:])
        errors = ", ".join(f"{max(row[kind] for row in shown):.0e}" for kind in _ERRORS)
        parts.append(f"| `{name}` | {shown[0]['class']} | {variants} | {errors} |")
    parts.append("\nExact given text, and refused given images:\n\n| model type | why: it ... |\n| --- | --- |")
    parts += [f"| `{name}` | {reason} |" for name, reason in WITHOUT_IMAGES.items()]
    return "\n".join(parts) + "\n"


def _of_text(results: dict[str, Any], *others: dict[str, Any]) -> str:
    rows = {row["model"]: row for row in results["rows"]}
    exact = _exact(results)
    parts = [
        _INTRODUCTION,
        " ".join(map(_counts, (results, *others))) + "\n",
        "## Exact\n",
        "| model type | class | variants that were compared too | largest error: log-probs, gradients | note |\n"
        "| --- | --- | --- | --- | --- |",
    ]
    # Some are not in the registry of causal language models but still take text.
    besides = dict.fromkeys(name.partition(":")[0] for name in rows if name.partition(":")[0] not in rows)
    for name in (*exact, *besides):
        variants = [other.partition(":")[2] for other in rows if other.startswith(f"{name}:")]
        shown = [row for other, row in rows.items() if other.partition(":")[0] == name]
        errors = ", ".join(f"{max(row.get(kind, 0.0) for row in shown):.0e}" for kind in _ERRORS)
        note = FAMILIES[name].note
        parts.append(f"| `{name}` | {shown[0]['class']} | {', '.join(variants)} | {errors} | {note} |")
    parts += [
        "\n## Refused\n",
        "Mode `padded` is ordinary training, and exact where the last column names a model type: `--mode padded`, or\n"
        "`kvpref.attach(model, padded_only=True)`.\n",
        "| model types | why: it or they ... | nearest that is supported | exact in mode `padded` |\n"
        "| --- | --- | --- | --- |",
    ]
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, refusal in REFUSED.items():
        by_reason[refusal.reason].append(name)
    for reason, names in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        nearest = dict.fromkeys(REFUSED[name].nearest for name in names)
        padded = [name for name in names if REFUSED[name].padded]
        parts.append(f"| {_code(names)} | {reason} | {_code(nearest)} | {_code(padded)} |")
    return "\n".join(parts) + "\n"


def _exact(results: dict[str, Any]) -> list[str]:
    return [row["model"] for row in results["rows"] if ":" not in row["model"] and row["verdict"] == "exact"]


def _counts(results: dict[str, Any]) -> str:
    versions = " and ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    num_entries, num_exact = sum(":" not in row["model"] for row in results["rows"]), len(_exact(results))
    return f"With {versions}, of {num_entries} entries {num_exact} are exact and {num_entries - num_exact} refused."


def read() -> list[dict[str, Any]]:
    """The kept results, newest release first."""
    return [json.loads(path.read_text()) for path in (RESULTS, *sorted(RESULTS.parent.glob("census_[0-9]*.json")))]


def read_images() -> list[dict[str, Any]]:
    """The same for models with images."""
    others = sorted(IMAGE_RESULTS.parent.glob("census_images_*.json"))
    return [json.loads(path.read_text()) for path in (IMAGE_RESULTS, *others)]


_ERRORS = ("logp_error", "gradient_error")


def _code(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(render(read(), read_images()))
