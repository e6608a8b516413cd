"""Each loss against its equation written out, and the errors for groups that it cannot use."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import kvpref
from kvpref.losses import DPO, SFT, as_loss, make_loss

# float64 scalars
TOLERANCE = 1e-12


def make_batch(labels: list[tuple[bool, ...] | None], scores: list[tuple[float | None, ...] | None]) -> kvpref.Batch:
    """Groups of sequences with 1, 2, 3, ... scored tokens."""
    groups = []
    for index, (label, score) in enumerate(zip(labels, scores, strict=True)):
        size = len(label or score or ())
        sequences = [
            kvpref.Sequence.from_prompt_and_response([1, 2], list(range(3, 4 + position))) for position in range(size)
        ]
        groups.append(kvpref.Group(sequences, labels=label, scores=score, id=f"file:{index + 1}"))
    return kvpref.collate(groups)


def make_logps(batch: kvpref.Batch, seed: int) -> kvpref.ResponseLogps:
    lengths = torch.tensor([sum(sequence.scored) for sequence in batch.sequences])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    generator = torch.Generator().manual_seed(seed)
    token_logps = -torch.rand(int(lengths.sum()), generator=generator, dtype=torch.float64) * 3
    return kvpref.ResponseLogps(token_logps.requires_grad_(), cu_seqlens, batch.group_index)


def sequence_sums(logps: kvpref.ResponseLogps) -> list[float]:
    ends = logps.cu_seqlens.tolist()
    return [sum(logps.token_logps[start:end].tolist()) for start, end in pairwise(ends)]


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.7, 0.0), (0.5, 0.2)])
def test_dpo_is_equation_7(beta: float, smoothing: float) -> None:
    # The second group is labelled the other way round, the third by scores.
    batch = make_batch([(True, False), (False, True), None], [None, None, (0.2, 0.9)])
    policy, reference = make_logps(batch, 0), make_logps(batch, 1)
    output = DPO(beta=beta, label_smoothing=smoothing)(policy, reference, batch)
    pi, ref = sequence_sums(policy), sequence_sums(reference)
    losses, margins = [], []
    for chosen, rejected in ((0, 1), (3, 2), (5, 4)):
        margin = beta * ((pi[chosen] - ref[chosen]) - (pi[rejected] - ref[rejected]))
        margins.append(margin)
        losses.append((1 - smoothing) * math.log1p(math.exp(-margin)) + smoothing * math.log1p(math.exp(margin)))
    assert output.loss.item() == pytest.approx(sum(losses) / 3, abs=TOLERANCE)
    assert output.metrics["rewards/margins"].item() == pytest.approx(sum(margins) / 3, abs=TOLERANCE)
    assert output.metrics["rewards/accuracies"].item() == pytest.approx(sum(m > 0 for m in margins) / 3)
    assert output.metrics["logps/chosen"].item() == pytest.approx((pi[0] + pi[3] + pi[5]) / 3, abs=TOLERANCE)
    assert not any(value.requires_grad for value in output.metrics.values())


def test_dpo_gradient_pulls_chosen_up_and_rejected_down() -> None:
    batch = make_batch([(True, False)], [None])
    policy = make_logps(batch, 0)
    DPO()(policy, make_logps(batch, 1), batch).loss.backward()
    assert policy.token_logps.grad is not None
    assert (policy.token_logps.grad[:1] < 0).all()
    assert (policy.token_logps.grad[1:] > 0).all()


def test_dpo_without_reference_is_refused() -> None:
    batch = make_batch([(True, False)], [None])
    with pytest.raises(kvpref.InputError, match="dpo needs reference log-probs"):
        DPO()(make_logps(batch, 0), None, batch)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ((True, False, False), None, "file:1: .*exactly 2 responses.*has 3"),
        (None, (0.5, 0.5), "file:1: cannot tell which response is preferred"),
        (None, (0.5, None), "file:1: cannot tell which response is preferred"),
        ((True, True), None, "file:1: cannot tell which response is preferred"),
    ],
)
def test_dpo_refuses_what_is_no_pair(
    labels: tuple[bool, ...] | None, scores: tuple[float | None, ...] | None, message: str
) -> None:
    batch = make_batch([labels], [scores])
    with pytest.raises(kvpref.InputError, match=message):
        DPO()(make_logps(batch, 0), make_logps(batch, 1), batch)


def test_sft_is_the_mean_over_tokens_of_the_best_responses() -> None:
    # Best: the second of the first group (2 tokens), the third of the second group (3 tokens; first of two equals).
    batch = make_batch([(False, True), None], [None, (0.1, None, 0.9, 0.9)])
    policy = make_logps(batch, 0)
    loss = SFT()
    sums = sequence_sums(policy)
    assert loss(policy, None, batch).loss.item() == pytest.approx(-(sums[1] + sums[4]) / 5, abs=TOLERANCE)
    assert loss.num_units(batch) == 5


def test_sft_select_keeps_the_loss_and_drops_the_rest() -> None:
    batch = make_batch([(False, True), None], [None, (0.1, None, 0.9, 0.9)])
    loss = SFT()
    selected = kvpref.collate([loss.select(group) for group in batch.groups])
    assert [len(group) for group in selected.groups] == [1, 1]
    assert [sequence.input_ids for sequence in selected.sequences] == [
        batch.sequences[1].input_ids,
        batch.sequences[4].input_ids,
    ]
    assert loss.num_units(selected) == loss.num_units(batch)


def test_sft_refuses_a_group_without_a_best_response() -> None:
    batch = make_batch([None], [(None, None)])
    with pytest.raises(kvpref.InputError, match="file:1: no response is labelled as chosen and none has a score"):
        SFT()(make_logps(batch, 0), None, batch)


def test_a_plain_function_is_a_loss() -> None:
    def my_loss(
        policy: kvpref.ResponseLogps, reference: kvpref.ResponseLogps | None, batch: kvpref.Batch
    ) -> kvpref.LossOutput:
        return kvpref.LossOutput(-policy.mean().mean(), {})

    batch = make_batch([(True, False)], [None])
    policy = make_logps(batch, 0)
    loss = as_loss(my_loss)
    sums = sequence_sums(policy)
    assert loss(policy, None, batch).loss.item() == pytest.approx(-(sums[0] / 1 + sums[1] / 2) / 2, abs=TOLERANCE)
    assert (loss.needs_reference, loss.num_units(batch)) == (False, 1)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dop", {}, "unknown loss 'dop'; choose from: dpo, .*sft"),
        ("dpo", {"gamma": 1}, "loss 'dpo' has no setting 'gamma'; it has: beta, .*label_smoothing"),
        ("dpo", {"beta": 0}, "beta must be positive"),
        ("dpo", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        make_loss(name, **settings)
