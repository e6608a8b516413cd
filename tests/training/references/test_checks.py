"""The trainer refuses at construction what the loss could not read: a head that is not there, missing columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from preference_runs import make_args, make_groups, make_model
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

import kvpref


@kvpref.loss(columns=["weight", "source"])
def weighted(policy: Any, reference: Any, batch: kvpref.Batch) -> kvpref.LossOutput:
    """A loss of two columns."""
    return kvpref.LossOutput(loss=(policy.sum() * batch.sequence_column("weight")).mean(), metrics={})


@kvpref.loss(reads="ends")
def spread(policy: Any, reference: Any, batch: kvpref.Batch) -> kvpref.LossOutput:
    """A loss of rewards."""
    return kvpref.LossOutput(loss=policy.rewards.var(), metrics={})


def with_columns(group: kvpref.Group, **columns: Any) -> kvpref.Group:
    return kvpref.Group(group.sequences, labels=group.labels, id=group.id, columns=columns)


def reward_model(num_labels: int) -> GPT2ForSequenceClassification:
    config = make_model().config
    config.num_labels, config.pad_token_id = num_labels, 0
    return GPT2ForSequenceClassification(config).double()


@pytest.mark.parametrize("where", ["train", "eval"])
def test_a_group_without_a_column_is_named(tmp_path: Path, where: str) -> None:
    groups = [with_columns(group, weight=1.0, source="a") for group in make_groups()]
    lacking = [*groups[:7], with_columns(groups[7], weight=1.0), *groups[8:]]
    datasets = {"train_dataset": groups, "eval_dataset": groups}
    kvpref.PreferenceTrainer(make_model(), make_args(str(tmp_path)), loss=weighted, **datasets)
    datasets[f"{where}_dataset"] = lacking
    with pytest.raises(kvpref.InputError, match=r"made:8: loss 'weighted' reads the column 'source'.*: weight$"):
        kvpref.PreferenceTrainer(make_model(), make_args(str(tmp_path)), loss=weighted, **datasets)


@pytest.mark.parametrize(
    ("make", "loss", "message"),
    [
        (make_model, spread, r"'spread' reads one reward per response, and GPT2LMHeadModel .*num_labels=1"),
        (lambda: reward_model(3), spread, r"GPT2ForSequenceClassification gives 3 numbers; load it with num_labels=1"),
        (lambda: reward_model(1), None, r"'DPO' reads log-probs of tokens, and GPT2ForSequenceClassification has none"),
    ],
    ids=["no rewards", "three numbers", "no log-probs"],
)
def test_a_model_without_the_head_that_the_loss_reads(tmp_path: Path, make: Any, loss: Any, message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        kvpref.PreferenceTrainer(make(), make_args(str(tmp_path)), train_dataset=make_groups(), loss=loss)


def test_a_reward_model_as_reference_is_refused(tmp_path: Path) -> None:
    trainer = kvpref.PreferenceTrainer(
        make_model(), make_args(str(tmp_path)), train_dataset=make_groups(), reference_model=reward_model(1)
    )
    with pytest.raises(kvpref.InputError, match="GPT2ForSequenceClassification has no language-model head"):
        trainer.train()


def test_the_head_that_the_loss_reads_is_accepted(tmp_path: Path) -> None:
    for number, (model, loss, kind) in enumerate(
        ((make_model(), None, GPT2LMHeadModel), (reward_model(1), spread, GPT2ForSequenceClassification))
    ):
        args = make_args(str(tmp_path / str(number)), max_steps=1, learning_rate=1e-3)
        trainer = kvpref.PreferenceTrainer(model, args, train_dataset=make_groups(), loss=loss)
        trainer.train()
        assert isinstance(trainer.model, kind)
