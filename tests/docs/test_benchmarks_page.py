"""The figures in docs/benchmarks.md are those that were measured."""

from __future__ import annotations

import json
from typing import Any

import pytest
from markdown_pages import DOCS, ROOT

PAGE = DOCS / "benchmarks.md"


@pytest.mark.parametrize(
    ("sweep", "title"),
    [
        ("attention", "attention"),
        ("forward_backward", "forward + backward"),
        ("train_step", "training step"),
        ("layer_kinds", "windows, recurrences, experts"),
        ("images", "image prompts; `two_pass`, `bounded`"),
    ],
)
def test_speedups_are_those_that_were_measured(sweep: str, title: str) -> None:
    for row in _results(sweep)["comparisons"]:
        shares = [result for result in row["results"] if result["name"] != row["baseline"]]
        cells = [f"{result['speedup']['median']:.2f}x" for result in shares]
        cells.append(f"{shares[0]['ideal']:.2f}x")
        cells.append(", ".join(f"{result['efficiency']['median']:.2f}" for result in shares))
        assert [cell for cell in _cells(row["name"], f"| {title} |")[2:] if cell][: len(cells)] == cells


def test_speedups_of_trajectories_are_those_that_were_measured() -> None:
    for row in _results("trajectories")["comparisons"]:
        found = {result["name"]: result for result in row["results"]}
        shares = [found["two_pass"], found["one_pass"]]
        cells = [f"{result['speedup']['median']:.2f}x" for result in shares]
        cells.append(f"{shares[0]['ideal']:.2f}x")
        cells.append(", ".join(f"{result['efficiency']['median']:.2f}" for result in shares))
        assert _cells(row["name"], "| agents' trajectories |")[2:6] == cells


def test_times_beside_trls_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import trl_users_table

    lines = trl_users_table.table(ROOT / "benchmarks" / "results")
    assert len(lines) == 2 + 4
    assert "\n".join(lines) in PAGE.read_text()


def _results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def _cells(name: str, first: str) -> list[str]:
    """Of the first table row that has a cell of this name, from the row that begins with `first` on."""
    text = PAGE.read_text()
    rows = text[text.index(f"\n{first}") :].splitlines()
    cells = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|"))
    return next(row for row in cells if name in row)


def test_the_reward_models_accuracy_is_what_was_measured() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "reward_model.json").read_text())
    means, first = result["mean_over_seeds"], result["runs"][0]
    stated = " ".join(PAGE.read_text().split())
    low, high = means["pair_accuracy_95"]
    assert f"orders {means['pair_accuracy']:.1%} of {first['num_pairs']} held-out pairs" in stated
    assert f"95% interval over problems {low:.1%} to {high:.1%}" in stated
    assert f"right in {means['best_of_n_score']:.1%} of the {first['num_groups']} problems" in stated
    assert f"one at random in {means['mean_score']:.1%}" in stated
    assert low > 0.5
    assert means["best_of_n_gain_95"][0] > 0


def test_the_cost_of_shared_prefix_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "shared_prefix.json").read_text())["rows"]
    ratio = {(r["num_tokens"], round(100 * r["share_saved"]), r["training"]): f"{r['ratio']:.2f}" for r in rows}
    stated = " ".join(PAGE.read_text().split())
    assert f"16 x 256 tokens {ratio[256, 0, True]} in training and {ratio[256, 0, False]} without gradients" in stated
    assert f"4 x 64 tokens {ratio[64, 0, True]} and {ratio[64, 0, False]}" in stated
    assert f"25% of the tokens shared {ratio[256, 25, True]} and {ratio[256, 25, False]}" in stated
    assert f"66% {ratio[256, 66, True]} and {ratio[256, 66, False]}" in stated
