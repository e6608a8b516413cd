"""Every objective with weights of tokens: a token of weight 2 is two tokens, one of weight 0 is none.

Integer weights are compared with sequences that have each token that many times, in the loss, its gradient, its metrics
and what it counts as units; so no sum or mean over tokens can leave the weights out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvpref
from kvpref import Batch, Group, LossOutput, ResponseLogps, ResponseRewards, Sequence
from kvpref.losses import LOSSES, PreferenceLoss, make_loss

TOLERANCE = 1e-12  # float64 sums of the same numbers, some of them added twice in place of once times 2

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in LOSSES},
    "mixture": ("mixture", {"weights": {"dpo": 0.5, "sft": 0.7, "nca": 0.2}}),
    "mixture of tokens": ("mixture", {"weights": {"dapo": 0.5, "bnpo": 0.7}}),
    "dpo of all": ("dpo", {"weighting": True, "ld_alpha": 0.3}),
    "simpo smoothed": ("simpo", {"label_smoothing": 0.1}),
    "sigmoid_norm js": ("sigmoid_norm", {"divergence": "js"}),
    "ipo ld": ("ipo", {"ld_alpha": 0.0}),
    "orpo strong": ("orpo", {"beta": 1.0}),
    "alphapo steep": ("alphapo", {"alpha": -0.5}),
    "sft per response": ("sft", {"average": "response"}),
    "grpo of all": ("grpo", {"beta": 0.1, "entropy_coef": 0.1, "old": "reference", "advantages": "gain"}),
    "grpo of old": ("grpo", {"beta": 0.1, "old": "old", "correct_kl": False}),
    "grpo by turn": ("grpo", {"advantages": "turn_scores", "old": "old"}),
    "dr_grpo of old": ("dr_grpo", {"beta": 0.1, "old": "old", "entropy_coef": 0.1}),
    "dapo of all": ("dapo", {"beta": 0.1, "entropy_coef": 0.1, "old": "old", "advantages": "gain"}),
    "bnpo of reference": ("bnpo", {"old": "reference"}),
    "cispo of old": ("cispo", {"old": "old", "beta": 0.1, "max_ratio": 1.2}),
    "gspo of old": ("gspo", {"old": "old", "beta": 0.1, "kl_estimator": "k2", "epsilon": 0.1, "epsilon_high": 0.2}),
    "rloo of old": ("rloo", {"beta": 0.1, "old": "old", "epsilon": 0.5}),
}
PAIRED = {
    *("dpo", "robust", "sigmoid_norm", "hinge", "ipo", "exo", "discopop", "nca", "bco", "sppo", "apo_zero", "apo_down"),
    *("aot", "aot_unpaired", "simpo", "alphapo", "orpo", "cpo", "kto", "mpo", "rpo"),
}
# Per group and response, the tokens' weights by turn; there is a response in which nothing counts.
WEIGHTS = [
    [[[2, 1], [0, 3, 1]], [[1], [1, 2]], [[0, 1, 1], [2]]],
    [[[3, 0], [1]], [[0, 0], [0]]],
    [[[1, 1, 2], [1]], [[2], [0, 0, 2]], [[1], [1]], [[1, 0, 4], [1, 1]]],
]
SCORES = [(0.3, None, 0.9), (0.5, 0.1), (0.2, 0.0, 1.0, 0.6)]
GAIN = [[[0.5, -1.0], 0.25, [1.0, 0.5]], [-0.5, [1.0, 2.0]], 0.75]


def make(case: str) -> PreferenceLoss:
    name, settings = CASES[case]
    return make_loss(name, **settings)


def is_paired(case: str) -> bool:
    return CASES[case][0] in PAIRED or case == "mixture"


def response(prompt: list[int], turns: list[list[int]], way: str) -> Sequence:
    """Turns with a token between them: ``weighted``, each token ``repeated`` as often as it counts, ``ones`` or not."""
    ids, flags, place = list(prompt), [False] * len(prompt), 10
    for turn in turns:
        for weight in turn:
            place += 1
            copies = weight if way == "repeated" else 1
            ids += [place] * copies
            flags += [True] * copies
        ids.append(9)
        flags.append(False)
    weights = [float(weight) for turn in turns for weight in turn]
    return Sequence(ids, flags, weights={"weighted": weights, "ones": [1.0] * len(weights)}.get(way))


def spread(entries: list[float], turns: list[list[int]], way: str) -> list[float]:
    """Numbers of tokens, as often as the tokens are there."""
    counts = [weight if way == "repeated" else 1 for turn in turns for weight in turn]
    return [value for value, count in zip(entries, counts, strict=True) for _ in range(count)]


def make_groups(case: str, way: str) -> list[Group]:
    groups = []
    for number, responses in enumerate(WEIGHTS):
        if is_paired(case):
            responses = responses[:2]
        prompt = [1, 2 + number]
        old = [[-0.3 - 0.2 * place for place in range(sum(map(len, turns)))] for turns in responses]
        gain = GAIN[number] if isinstance(GAIN[number], list) else [GAIN[number]] * len(responses)
        by_token = [
            spread([x for x, turn in zip(entry, turns, strict=True) for _ in turn], turns, way)
            if isinstance(entry, list)
            else entry
            for entry, turns in zip(gain, responses, strict=False)  # type: ignore[arg-type]
        ]
        scores = SCORES[number][: len(responses)]
        if CASES[case][0] in ("kto", "apo_zero_unpaired"):
            scores = tuple(score or 0.0 for score in scores)
        groups.append(
            Group(
                [response(prompt, turns, way) for turns in responses],
                labels=[number != 1, number == 1] if is_paired(case) else None,
                scores=None if is_paired(case) else scores,
                columns={
                    "old": [spread(row, turns, way) for row, turns in zip(old, responses, strict=True)],
                    "gain": by_token,
                    "turn_scores": [
                        [0.5 * index, 1.0 - 0.3 * number] if any(map(any, turns)) else None
                        for index, turns in enumerate(responses)
                    ],
                },
                id=f"file:{number + 1}",
            )
        )
    return groups


def collated(case: str, way: str) -> Batch:
    return kvpref.collate(list(make(case).prepare(make_groups(case, way))))


def outputs(case: str, batch: Batch, seed: int, like: Batch | None = None) -> Any:
    """What a model might give. `like` is the batch with weights whose tokens are repeated in this one."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> torch.Tensor:
        return -1.5 * torch.rand(count, generator=generator, dtype=torch.float64)

    if make(case).reads == "ends":
        return ResponseRewards(drawn(batch.num_sequences).requires_grad_(), batch.group_index)
    source = batch if like is None else like
    logps, entropy, collision = (drawn(source.num_scored_tokens) for _ in range(3))
    if like is not None:
        counts = like.token_weights(torch.float64)
        assert counts is not None
        logps, entropy, collision = (values.repeat_interleave(counts.long()) for values in (logps, entropy, collision))
    return ResponseLogps(
        logps.requires_grad_(),
        batch.cu_seqlens,
        batch.group_index,
        entropy=-entropy,
        collision=collision,
        weights=batch.token_weights(torch.float64),
    )


def compute(case: str, batch: Batch, like: Batch | None = None) -> tuple[LossOutput, torch.Tensor]:
    loss = make(case)
    policy = outputs(case, batch, 0, like)
    reference = outputs(case, batch, 1, like) if loss.needs_reference else None
    output = loss(policy, reference, batch)
    output.loss.backward()
    return output, policy[0].grad


@pytest.mark.parametrize("case", CASES)
def test_an_integer_weight_is_that_many_tokens(case: str) -> None:
    weighted, repeated = collated(case, "weighted"), collated(case, "repeated")
    found, gradient = compute(case, weighted)
    expected, slopes = compute(case, repeated, weighted)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE, equal_nan=True)
    assert make(case).num_units(weighted) == make(case).num_units(repeated) > 0
    if make(case).reads == "tokens":
        counts = weighted.token_weights(torch.float64)
        assert counts is not None
        owners = torch.arange(len(counts)).repeat_interleave(counts.long())
        slopes = torch.zeros(len(counts), dtype=torch.float64).index_add(0, owners, slopes)
        assert (gradient[counts == 0] == 0).all()
    torch.testing.assert_close(gradient, slopes, rtol=0, atol=TOLERANCE)
    assert (gradient != 0).any()


@pytest.mark.parametrize("case", CASES)
def test_weights_of_one_change_nothing(case: str) -> None:
    plain, ones = collated(case, "plain"), collated(case, "ones")
    assert (plain.token_weights(torch.float64), ones.token_weights(torch.float64) is None) == (None, False)
    found, gradient = compute(case, ones)
    expected, slopes = compute(case, plain)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(gradient, slopes)
    for name, value in expected.metrics.items():
        assert torch.equal(found.metrics[name], value), name
    assert make(case).num_units(ones) == make(case).num_units(plain)


@pytest.mark.parametrize("case", ["sft", "dapo", "bnpo", "cispo", "mixture of tokens"])
def test_means_over_tokens_do_not_change_when_all_weights_are_scaled(case: str) -> None:
    """Down to sums far below 1, which no clamp may raise."""
    batch = collated(case, "weighted")
    expected, slopes = compute(case, batch)
    small = kvpref.collate(
        [
            Group(
                [Sequence(s.ids, s.flags, weights=[w / 1024 for w in s.weights or ()]) for s in group.sequences],
                group.scores,
                id=group.id,
            )
            for group in batch.groups
        ]
    )
    found, gradient = compute(case, small)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(gradient, slopes, rtol=0, atol=TOLERANCE)
    assert make(case).num_units(small) == pytest.approx(make(case).num_units(batch) / 1024)


def test_a_batch_in_which_nothing_counts_has_a_loss_of_zero() -> None:
    """And the means of a step have no unit of it."""
    silent = Sequence([1, 2, 3], [False, True, True], weights=[0.0, 0.0])
    batch = kvpref.collate([Group([silent, silent], scores=[0.0, 1.0], id="file:1")])
    for name in ("sft", "dapo"):
        loss = make_loss(name)
        policy = ResponseLogps(
            torch.tensor([-1.0, -2.0] * 2, requires_grad=True),
            batch.cu_seqlens,
            batch.group_index,
            weights=batch.token_weights(torch.float32),
        )
        output = loss(policy, None, batch)
        output.loss.backward()
        assert (output.loss.item(), loss.num_units(batch)) == (0, 0)
        assert policy.token_logps.grad is not None
        assert (policy.token_logps.grad == 0).all()
    idle = make_loss("sft").idle(batch.groups[0])
    assert idle is not None
