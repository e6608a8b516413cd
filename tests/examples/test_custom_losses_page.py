"""The code of docs/custom_losses.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import preference_runs as runs
import pytest

import kvpref
from kvpref.losses.catalog import describe_loss

PAGE = Path(__file__).resolve().parents[2] / "docs" / "custom_losses.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's Python defines, from a file: its docstrings are read from source."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    path = tmp_path_factory.mktemp("page") / "page.py"
    path.write_text("\n".join(blocks))
    found = ("weighted_dpo", "LongPromptsCountLess", "TokenEntropyBonus")
    return {name: kvpref.losses.user.find_loss(f"{path}:{name}", ()) for name in found}


def train(loss: Any, groups: list[kvpref.Group], folder: Path, **overrides: Any) -> kvpref.PreferenceTrainer:
    args = runs.make_args(str(folder), max_steps=1, **overrides)
    trainer = kvpref.PreferenceTrainer(runs.make_model(), args, train_dataset=groups, loss=loss)
    trainer.train()
    return trainer


def test_the_function_trains(names: dict[str, Any], tmp_path: Path) -> None:
    groups = [
        kvpref.Group(group.sequences, labels=group.labels, id=group.id, columns={"weight": 0.5})
        for group in runs.make_groups()
    ]
    trainer = train(names["weighted_dpo"], groups, tmp_path)
    logged = trainer.state.log_history[0]
    # Before the first step policy and reference are one: half of log 2.
    assert logged["loss"] == pytest.approx(0.5 * 0.6931, abs=1e-3)
    assert logged["margin"] == pytest.approx(0, abs=1e-6)


def test_a_group_made_in_memory_without_the_column_is_named(names: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(kvpref.InputError, match=r"made:1: .*column 'weight'"):
        train(names["weighted_dpo"], runs.make_groups(), tmp_path)


def test_the_class_that_prepares_batches_trains(names: dict[str, Any], tmp_path: Path) -> None:
    made = []
    loss = names["LongPromptsCountLess"]()
    original = type(loss).__call__
    type(loss).__call__ = lambda self, policy, reference, batch: (
        made.append(len(batch._made)) or original(self, policy, reference, batch)
    )
    train(loss, runs.make_groups(), tmp_path)
    assert set(made) == {1}, "what it reads is there when it is called"


def test_the_class_counts_tokens_so_cutting_a_step_changes_nothing(names: dict[str, Any], tmp_path: Path) -> None:
    loss = names["TokenEntropyBonus"]()
    weights = []
    for budget in (None, 60):
        trainer = train(loss, runs.make_groups(), tmp_path / str(budget), max_tokens_per_micro_batch=budget)
        weights.append(trainer.model.get_input_embeddings().weight)  # type: ignore[operator]
    # float64; the order of additions differs
    assert (weights[0] - weights[1]).abs().max() < 1e-12


def test_what_the_list_says_of_them(names: dict[str, Any]) -> None:
    described = describe_loss("page", names["TokenEntropyBonus"])
    assert (described.unit, described.needs_reference) == ("tokens", False)
    assert described.settings[0].explanation == "Nats of likelihood that a nat of entropy is worth."
    assert describe_loss("page", names["weighted_dpo"]).needs_reference is True
