"""docs/models.md, the lists of families and the kept results of the census say the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ENTRIES

from kvpref.models.families import FAMILIES, REFUSED
from kvpref.models.vision.families import VISION, WITHOUT_IMAGES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = [
    path
    for path in sorted((ROOT / "benchmarks" / "results").glob("census*.json"))
    if not path.stem.startswith("census_images")
]
IMAGE_RESULTS = sorted((ROOT / "benchmarks" / "results").glob("census_images*.json"))


def test_the_page_is_made_from_the_kept_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from census_page import PAGE, read, read_images, render

    assert PAGE.read_text() == render(read(), read_images()), "run python benchmarks/census_page.py"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_lists_agree_with_the_kept_results(path: Path) -> None:
    found = json.loads(path.read_text())["rows"]
    rows = {row["model"]: row["verdict"] for row in found}
    assert set(rows.values()) == {"exact", "refused"}
    for name, verdict in rows.items():
        entry = name.partition(":")[0]
        assert verdict == ("exact" if entry in FAMILIES else "refused"), name
        assert (entry in FAMILIES) != (entry in REFUSED)
    for row in found:
        if row["model"] in REFUSED and "not_built" not in row:
            assert (row["padded"] == "exact") == REFUSED[row["model"]].padded, row["model"]


@pytest.mark.parametrize("path", IMAGE_RESULTS, ids=lambda path: path.stem)
def test_lists_agree_with_the_kept_results_of_images(path: Path) -> None:
    rows = {row["model"]: row["verdict"] for row in json.loads(path.read_text())["rows"]}
    assert set(rows.values()) == {"exact", "refused"}
    for name, verdict in rows.items():
        entry = name.partition(":")[0]
        assert verdict == ("exact" if entry in VISION else "refused"), name
        assert (entry in VISION) + (entry in REFUSED) + (entry in WITHOUT_IMAGES) == 1


def test_every_entry_of_the_installed_release_is_known() -> None:
    unknown = [name for name in ENTRIES if name not in FAMILIES and name not in REFUSED]
    assert not unknown, f"run benchmarks/census.py --unlisted --models {' '.join(unknown)}"
