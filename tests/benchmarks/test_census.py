"""The census on a dozen models that differ in masks, head, experts and recurrence; on all in `make test-all`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ENTRIES

from kvpref.models.families import FAMILIES, REFUSED

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
QUICK = (
    "deepseek_v3",
    "falcon_h1",
    "gemma2",
    "gemma3n_text",
    "gpt2",
    "gpt_oss",
    "llama4_text",
    "llama:yarn",
    "mamba2",
    "qwen3:windows",
    "qwen3_moe",
    "qwen3_next",
)
REST = [name for name in ENTRIES if name not in QUICK and name in FAMILIES]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in REST)])
def test_exact(name: str) -> None:
    from census_check import MODES, check

    row = check(name, MODES)
    assert row["verdict"] == "exact", row


@pytest.mark.parametrize(
    "name",
    ["bloom", "deepseek_v32", "gemma4_assistant"]
    + [pytest.param(name, marks=pytest.mark.full) for name in REFUSED if name in ENTRIES],
)
def test_refused_with_the_reason(name: str) -> None:
    from census_check import check

    row = check(name, ("two_pass",))
    assert row["verdict"] == "refused", row
    assert REFUSED[name].reason in row["reason"]


def test_what_is_wrong_is_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is off by a little, in the backward pass alone."""
    import census_check

    engine = census_check._engine

    def off(*args: object) -> census_check.Gradients:
        found = engine(*args)
        return found._replace(
            grads={**found.grads, "transformer.ln_f.bias": 1.01 * found.grads["transformer.ln_f.bias"]}
        )

    monkeypatch.setattr(census_check, "_engine", off)
    row = census_check.check("gpt2", ("two_pass",))
    assert row["verdict"] == "wrong"
    assert "gradient of transformer.ln_f.bias" in row["reason"]


def test_every_variant_is_of_a_known_entry() -> None:
    from census_settings import SETTINGS
    from census_variants import VARIANTS

    known = {*FAMILIES, *REFUSED}
    assert {name.partition(":")[0] for name in VARIANTS} | set(SETTINGS) <= known
