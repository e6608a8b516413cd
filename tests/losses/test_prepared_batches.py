"""What losses read of a batch is made ahead, on the host: the same numbers, and no loss makes the host wait."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import host_waits
import pytest
import torch
from scored_groups import random_logps

import kvpref
from kvpref import Batch, Group, LossOutput, ResponseLogps, ResponseRewards, Sequence
from kvpref.losses import LOSSES, PreferenceLoss, as_loss, make_loss

SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"weighting": True, "ld_alpha": 0.5},
    "mixture": {"weights": {"dpo": 0.5, "sft": 0.7, "nca": 0.2}},
    "grpo": {"beta": 0.05, "entropy_coef": 0.01, "old": "reference"},
    "rloo": {"beta": 0.1},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo of columns": ("grpo", {"old": "old", "advantages": "weight"}),
    "dapo without equals": ("dapo", {"dynamic_sampling": True}),
    "bradley_terry with margins": ("bradley_terry", {"margin_column": "margin"}),
    "weighted_sft by column": ("weighted_sft", {"weights": "weight"}),
    "sft per response": ("sft", {"average": "response"}),
    "apo_zero_unpaired by score": ("apo_zero_unpaired", {"score_threshold": 0.4}),
}
CASES = [*LOSSES, *VARIANTS, "function"]
PAIRED = {
    *("dpo", "robust", "sigmoid_norm", "hinge", "ipo", "exo", "discopop", "nca", "bco", "sppo", "apo_zero", "apo_down"),
    *("aot", "aot_unpaired", "simpo", "alphapo", "orpo", "cpo", "kto", "mixture", "mpo", "rpo", "function"),
}


@kvpref.loss(needs_reference=True, columns=["weight", "old", "note"])
def weighted(policy: ResponseLogps, reference: ResponseLogps, batch: Batch) -> LossOutput:
    """Of a user: one column of each kind, and one that is no number."""
    assert batch.column("note") == ["text"] * batch.num_groups
    ratios = policy.token_logps - batch.token_column("old").to(policy.token_logps)
    weights = batch.sequence_column("weight")
    weights /= 2  # what a user does to a column must not be found again
    return LossOutput((policy.sum_of(ratios) * weights - reference.sum()).mean(), {})


def make(case: str) -> PreferenceLoss:
    if case == "function":
        return as_loss(weighted)
    name, settings = VARIANTS.get(case, (case, SETTINGS.get(case, {})))
    return make_loss(name, **settings)


def make_groups(case: str) -> list[Group]:
    """Pairs with labels, or two to four responses with scores; one group's are equal, and some are unrated."""
    scores = [(0.3, None, 0.9, 0.6), (0.5, 0.5), (0.2, 0.0, 1.0)]
    groups = []
    for index, own in enumerate(scores):
        own = (1.0, 0.0) if case in PAIRED else own
        if "unpaired" in case:
            own = tuple(score or 0.0 for score in own)
        lengths = [1 + (3 * index + 2 * place) % 4 for place in range(len(own))]
        groups.append(
            Group(
                [Sequence.from_prompt_and_response([1, 2 + index], range(9, 9 + length)) for length in lengths],
                labels=[index != 1, index == 1] if case in PAIRED else None,
                scores=None if case in PAIRED else own,
                columns={
                    "weight": [0.5 + place for place in range(len(own))],
                    "margin": 0.3 if index else [0.1 * place for place in range(len(own))],
                    "old": [[-0.2] * length for length in lengths],
                    "note": "text",
                },
                id=f"file:{index + 1}",
            )
        )
    return groups


def batch_of(case: str) -> Batch:
    return kvpref.collate(list(make(case).prepare(make_groups(case))))


def prepared(case: str) -> Batch:
    batch = batch_of(case)
    make(case).prepare_batch(batch)
    return batch


def outputs_of(case: str, batch: Batch, dtype: torch.dtype, seed: int) -> Any:
    """What a model might give, leaves with gradient, on the batch's device."""

    def drawn(*shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + 7 * len(shape))
        return (-2 * torch.rand(*shape, generator=generator, dtype=dtype)).to(batch.device)

    if make(case).reads == "ends":
        return ResponseRewards(drawn(batch.num_sequences).requires_grad_(), batch.group_index)
    num_scored = batch.num_scored_tokens
    return ResponseLogps(
        drawn(num_scored).requires_grad_(),
        batch.cu_seqlens,
        batch.group_index,
        entropy=-drawn(num_scored),
        collision=drawn(num_scored),
    )


def compute(case: str, batch: Batch, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Loss, metrics and gradient."""
    loss = make(case)
    policy = outputs_of(case, batch, dtype, 0)
    reference = outputs_of(case, batch, dtype, 100) if loss.needs_reference else None
    return differentiate(loss, policy, reference, batch)


def differentiate(loss: PreferenceLoss, policy: Any, reference: Any, batch: Batch) -> dict[str, torch.Tensor]:
    output = loss(policy, reference, batch)
    output.loss.backward()
    return {**output.metrics, "loss": output.loss.detach(), "gradient": policy[0].grad}


@pytest.mark.parametrize("case", CASES)
def test_no_loss_makes_the_host_wait(case: str) -> None:
    loss, batch = make(case), prepared(case).to("meta")
    policy = outputs_of(case, batch, torch.float32, 0)
    reference = outputs_of(case, batch, torch.float32, 1) if loss.needs_reference else None
    with host_waits.refused("meta"):
        found = differentiate(loss, policy, reference, batch)
    assert found["gradient"].shape == policy[0].shape


@pytest.mark.parametrize("case", CASES)
def test_the_watch_sees_what_is_not_made_ahead(case: str) -> None:
    loss, batch = make(case), batch_of(case).to("meta")
    policy = outputs_of(case, batch, torch.float32, 0)
    with host_waits.refused("meta"), pytest.raises(host_waits.WaitError):
        loss(policy, policy if loss.needs_reference else None, batch)


WAYS: dict[str, Callable[[Batch], Batch]] = {
    "ahead": lambda batch: batch,
    "moved": lambda batch: batch.pin_memory(),
    "from a data worker": lambda batch: pickle.loads(pickle.dumps(batch)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_made_ahead_the_numbers_are_the_same_to_the_bit(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # moves all tensors of a batch elsewhere
    expected = compute(case, batch_of(case), dtype)
    for way, send in WAYS.items():
        batch = send(prepared(case))
        num_made = len(batch._made)
        assert num_made > 0
        found = compute(case, batch, dtype)
        assert len(batch._made) == num_made, f"{way}: the loss makes more than what was made ahead"
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value) or (found[name].isnan() & value.isnan()).all(), (way, name)
        again = compute(case, batch, dtype)
        assert all(torch.equal(again[name], value) for name, value in found.items()), f"{way}: the batch was changed"


def test_each_thing_is_made_once() -> None:
    calls: list[tuple[str, ...]] = []

    def lengths(groups: tuple[Group, ...], *asked: str) -> tuple[torch.Tensor, int]:
        calls.append(asked)
        return torch.tensor([len(group) for group in groups]), len(groups)

    batch = batch_of("dpo")
    made, count = batch.tensors(lengths, "a")
    assert (made.tolist(), count) == ([2, 2, 2], 3)
    assert batch.tensors(lengths, "a")[0] is made
    assert batch.reading(kvpref.plan.passes.Reads(kind="ends")).tensors(lengths, "a")[0] is made
    assert batch.to("meta").tensors(lengths, "a")[0].device.type == "meta"
    assert calls == [("a",)]
    batch.tensors(lengths, "b")
    assert calls == [("a",), ("b",)]
    assert batch.to("meta").tensors(lengths)[0].device.type == "meta"


def test_losses_of_other_settings_do_not_share() -> None:
    groups = [Group(make_groups("kto")[0].sequences, scores=(0.3, 0.9), id="file:1")]
    batch = kvpref.collate(groups)
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    for threshold in (0.5, 0.1):
        loss = make_loss("apo_zero_unpaired", score_threshold=threshold)
        loss.prepare_batch(batch)
        found = loss(policy, reference, batch)
        assert torch.equal(found.loss, loss(policy, reference, kvpref.collate(groups)).loss)
        assert ("rewards/rejected" in found.metrics) == (threshold == 0.5)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("dpo", "file:1: a pairwise loss needs exactly 2 responses"),
        ("sft", "file:1: no response is labelled as chosen"),
        ("grpo", "file:1: no response has a score or a label"),
        ("grpo of columns", "file:1: no column 'old'"),
        ("kto", "file:1: response 0 has neither a label nor a score"),
        ("bradley_terry with margins", "file:1: no response has a score"),
        ("reward_regression", "file:1: no response has a score"),
        ("weighted_sft by column", "file:1: weighted_sft needs a column 'weight'"),
    ],
)
def test_what_is_missing_is_said_by_the_loss_too(case: str, message: str) -> None:
    """Collation may leave an error to the step."""
    loss = make(case)
    batch = kvpref.collate([Group([Sequence([1, 2, 3], [False, True, True])] * 3, id="file:1")])
    policy = outputs_of(case, batch, torch.float32, 0)
    with pytest.raises(kvpref.InputError, match=message):
        loss(policy, policy if loss.needs_reference else None, batch)
    if case != "grpo of columns":  # what kind of numbers a column holds is only guessed
        with pytest.raises(kvpref.InputError, match=message):
            loss.prepare_batch(batch)


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "mask": lambda x: x[x > 0],
    "put by mask": lambda x: x.clone().index_put_((x > 0,), x.new_zeros(())),
    "nonzero": lambda x: (x > 0).nonzero(),
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "list": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "repeat": lambda x: torch.repeat_interleave(x, torch.ones_like(x, dtype=torch.int64)),
    "from a list": lambda x: torch.tensor([1.0], device=x.device),
    "from a number": lambda x: torch.as_tensor(1.0, device=x.device),
    "like another": lambda x: x.new_tensor([1.0]),
    "from the host": lambda x: torch.ones(2).to(x.device),
    "host index": lambda x: x[torch.tensor([0, 1])],
}


@pytest.mark.parametrize("name", READS)
def test_the_watch_sees_every_kind_of_waiting(name: str) -> None:
    x = torch.ones(3, device="meta", requires_grad=True)
    with host_waits.refused("meta"):
        (2 * x[torch.zeros(2, dtype=torch.int64, device="meta")]).sum().backward()
        with pytest.raises(host_waits.WaitError):
            READS[name](x.detach())
