"""Weights of tokens reach the loss with the policy's and with the reference's log-probs, wherever these come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import make_args, make_groups, make_model

import kvpref
from kvpref import Group, Sequence

WAYS: dict[str, dict[str, Any]] = {
    "precomputed": {"precompute_reference": True},
    "online": {"precompute_reference": False},
    "bounded": {"precompute_reference": False, "schedule": "bounded", "max_tokens_per_chunk": 16},
}


def with_weights(group: Group) -> Group:
    def weigh(sequence: Sequence) -> Sequence:
        weights = [0.25 * (1 + place % 5) for place in range(sequence.num_scored)]
        return Sequence(sequence.ids, sequence.flags, weights=weights)

    chosen, rejected = group.sequences
    return Group([weigh(chosen), rejected], labels=group.labels, id=group.id)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("second", [True, False], ids=["second model", "policy"])
@pytest.mark.parametrize("way", WAYS)
def test_policy_and_reference_have_the_weights_of_the_data(tmp_path: Path, way: str, second: bool) -> None:
    seen: list[str] = []

    @kvpref.loss(needs_reference=True)
    def loss(policy: Any, reference: Any, batch: kvpref.Batch) -> torch.Tensor:
        expected = [
            weight for sequence in batch.sequences for weight in (sequence.weights or [1.0] * sequence.num_scored)
        ]
        for name, logps in (("policy", policy), ("reference", reference)):
            assert logps.weights.tolist() == expected, name
            assert logps.weights.dtype == logps.token_logps.dtype == torch.float64, name
        seen.append("train" if torch.is_grad_enabled() else "evaluate")
        return -(policy.sum() - reference.sum()).mean()

    groups = [with_weights(group) for group in make_groups(4)]
    args = make_args(str(tmp_path), max_steps=1, **WAYS[way])
    own = {"reference_model": make_model(seed=5)} if second else {}
    trainer = kvpref.PreferenceTrainer(
        make_model(), args, train_dataset=groups, eval_dataset=groups[:2], loss=loss, **own
    )
    trainer.train()
    trainer.evaluate()
    assert {"train", "evaluate"} <= set(seen)


def test_the_cut_into_micro_batches_does_not_change_a_mean_over_weighted_tokens(tmp_path: Path) -> None:
    """Units are then sums of weights; here all of a step are together below 1."""
    groups = [with_weights(group) for group in make_groups(4)]
    small = [
        Group(
            [
                Sequence(s.ids, s.flags, weights=[0.01 * (s.weights or [1.0] * 99)[i] for i in range(s.num_scored)])
                for s in group.sequences
            ],
            labels=group.labels,
            id=group.id,
        )
        for group in groups
    ]
    found = []
    for name, max_tokens in (("one", 10_000), ("many", 60)):
        model = make_model()
        args = make_args(
            str(tmp_path / name),
            loss="sft",
            max_steps=1,
            per_device_train_batch_size=4,
            learning_rate=0.1,
            max_tokens_per_micro_batch=max_tokens,
        )
        trainer = kvpref.PreferenceTrainer(model, args, train_dataset=small)
        trainer.train()
        found.append((trainer.state.log_history[0]["loss"], [p.detach().clone() for p in model.parameters()]))
    (first, weights), (second, others) = found
    assert first == pytest.approx(second, rel=1e-6)  # logged losses are float32
    for own, other in zip(weights, others, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10)
    start = make_model()
    assert not all(torch.equal(own, other) for own, other in zip(weights, start.parameters(), strict=True))
