"""README's code runs as it stands there, and its tables are those of the code and of the measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_pages import README, code_blocks, names_in, section, tables
from transformers import LlamaConfig, LlamaForCausalLM

import kvpref
from kvpref.losses import LOSSES
from kvpref.losses.catalog import describe_loss
from kvpref.profiling.memory.report import format_bytes

VOCAB_SIZE = 32


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """README's Python, in a folder that holds what it loads."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained("my-model")
    found = code_blocks(README, "python")
    assert len(found) == 3
    return found


def test_shared_prefix_serves_its_example(blocks: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    printed = capsys.readouterr().out.strip()
    assert f"print(shared.stats)  # {printed}\n" in blocks[0]

    model, input_ids, served = names["model"], names["input_ids"], names["outputs"]
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    alone = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=input_ids)
    alone.loss.backward()
    # float32, sums in another order
    torch.testing.assert_close(served.logits, alone.logits, rtol=0, atol=1e-5)
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=0, atol=1e-5)


def test_the_library_and_a_loss_of_ones_own(blocks: list[str]) -> None:
    _, library, loss = blocks
    names: dict[str, Any] = {}
    exec(library, names)
    padded = names["logps"].token_logps
    batch, model, cache = names["batch"], names["model"], names["cache"]
    assert batch.num_unique_tokens == 4 + 2 + 1 + 3
    assert cache.layers[0].get_seq_length() == 4
    # float32, two ways to one sum
    assert (kvpref.score_responses(model, batch, cache).token_logps - padded).abs().max() < 1e-5
    assert all(parameter.grad is not None for parameter in model.parameters())

    sequence = kvpref.Sequence.from_prompt_and_response
    prompt = list(range(1, 20))
    names["groups"] = [kvpref.Group([sequence(prompt, [20]), sequence(prompt, [21, 22])]) for _ in range(4)]
    exec(loss, names)
    names["args"].max_steps, names["args"].report_to = 1, []
    names["trainer"].train()
    assert names["trainer"].state.global_step == 1


def test_the_switch_for_trl_imports() -> None:
    pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
    from kvpref.integrations import trl as kvpref_trl

    (diff,) = code_blocks(README, "diff")
    lines = diff.splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(line[1:] for line in lines if line.startswith("-")), names)
    theirs = names["DPOTrainer"]
    exec("\n".join(line[1:] for line in lines if line.startswith("+")), names)
    assert len(lines) == 3
    assert names["DPOTrainer"] is kvpref_trl.DPOTrainer is not theirs


# Objectives

GROUP_ROWS = "**"


def objectives() -> list[dict[str, str]]:
    table = next(tables(section(README, "Objectives")))
    return [row for row in table if not row["name"].startswith(GROUP_ROWS)]


def test_every_loss_is_listed_once_and_nothing_else() -> None:
    listed = [name for row in objectives() for name in names_in(row["name"])]
    assert sorted(listed) == sorted(LOSSES)
    assert all(row["what"] and row["data"] for row in objectives())


def test_which_losses_read_a_reference() -> None:
    for row in objectives():
        (name,) = names_in(row["name"])
        described = describe_loss(name, LOSSES[name])
        if row["reference"] == "by setting":
            assert isinstance(LOSSES[name].needs_reference, property), name
        else:
            assert {"yes": True, "no": False}[row["reference"]] == described.needs_reference, name
            assert described.needs_reference or not isinstance(LOSSES[name].needs_reference, property), name


def test_which_losses_couple_the_groups_of_a_micro_batch() -> None:
    (paragraph,) = [text for text in section(README, "Objectives").split("\n\n") if "couple" in text]
    coupling = {name for name, kind in LOSSES.items() if "couples" in (kind.__doc__ or "")}
    assert set(names_in(paragraph)) == coupling


# Measurements


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


def test_peaks_are_those_that_were_measured() -> None:
    rows = _results("memory_profile")["profiles"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        peaks = [format_bytes(row["peak"]["total_bytes"]) for row in rows if row["variant"] == variant]
        assert len(peaks) == 4
        assert _cells(f"`{variant}`", "| peak of a step |")[1:] == peaks


def test_times_beside_trls_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(README.parent / "benchmarks"))
    import trl_users_table

    lines = trl_users_table.table(README.parent / "benchmarks" / "results")
    assert len(lines) == 2 + 4
    assert "\n".join(lines) in README.read_text()


def _results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((README.parent / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def _cells(name: str, first: str) -> list[str]:
    """Of the first table row that has a cell of this name, from the row that begins with `first` on."""
    text = README.read_text()
    rows = text[text.index(f"\n{first}") :].splitlines()
    cells = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|"))
    return next(row for row in cells if name in row)


def test_the_reward_models_accuracy_is_what_was_measured() -> None:
    result = json.loads((README.parent / "benchmarks" / "results" / "reward_model.json").read_text())
    means, first = result["mean_over_seeds"], result["runs"][0]
    stated = " ".join(README.read_text().split())
    low, high = means["pair_accuracy_95"]
    assert f"orders {means['pair_accuracy']:.1%} of {first['num_pairs']} held-out pairs" in stated
    assert f"95% interval over problems {low:.1%} to {high:.1%}" in stated
    assert f"right in {means['best_of_n_score']:.1%} of the {first['num_groups']} problems" in stated
    assert f"one at random in {means['mean_score']:.1%}" in stated
    assert low > 0.5
    assert means["best_of_n_gain_95"][0] > 0


def test_the_cost_of_shared_prefix_is_what_was_measured() -> None:
    rows = json.loads((README.parent / "benchmarks" / "results" / "shared_prefix.json").read_text())["rows"]
    ratio = {(r["num_tokens"], round(100 * r["share_saved"]), r["training"]): f"{r['ratio']:.2f}" for r in rows}
    stated = " ".join(README.read_text().split())
    assert f"16 x 256 tokens {ratio[256, 0, True]} in training and {ratio[256, 0, False]} without gradients" in stated
    assert f"4 x 64 tokens {ratio[64, 0, True]} and {ratio[64, 0, False]}" in stated
    assert f"25% of the tokens shared {ratio[256, 25, True]} and {ratio[256, 25, False]}" in stated
    assert f"66% {ratio[256, 66, True]} and {ratio[256, 66, False]}" in stated
