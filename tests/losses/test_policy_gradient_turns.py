"""Policy gradients with advantages by turn and by token, and scores by turn, against their equations written out."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from scored_groups import mean_over_units, micro_batches, random_logps, token_lists

import kvpref
from kvpref import Batch, Group, LossOutput, Sequence
from kvpref.losses import make_loss
from kvpref.losses.scores import known_scores, response_scores

TOLERANCE = 1e-12  # float64 scalars

TURNS = [[(2, 1, 3), (1, 2)], [(2, 2), (3, 1), (1, 1)], [(2, 1)]]
"""Per group and response, the scored tokens of its turns."""

TURN_SCORES: list[list[list[float] | None]] = [
    [[1.0, 0.0, 0.5], [0.25, 1.0]],
    [[0.0, 1.0], None, [0.5, 0.5]],
    [[1.0, 1.0]],
]


def response(lengths: tuple[int, ...], *, rewritten: bool = False) -> Sequence:
    """Turns with one token between them; the first is scored in a sequence of its own where it was rewritten."""
    scored = [False, *(flag for length in lengths for flag in [True] * length + [False])]
    if not rewritten:
        return Sequence(range(1, 1 + len(scored)), scored)
    first = 1 + lengths[0]
    later = [False] * first + scored[first:]
    return Sequence(range(30, 30 + len(later)), later, earlier=[Sequence(range(1, 1 + first), scored[:first])])


def make_batch(*, rewritten: bool = False, **columns: list[Any]) -> Batch:
    return kvpref.collate(
        [
            Group(
                [response(lengths, rewritten=rewritten) for lengths in group],
                id=f"file:{number + 1}",
                columns={name: values[number] for name, values in columns.items()},
            )
            for number, group in enumerate(TURNS)
        ]
    )


def by_token(values: list[list[list[float] | None]]) -> list[list[list[float] | None]]:
    """A number per turn, repeated for its tokens."""
    return [
        [
            None if row is None else [value for value, length in zip(row, lengths, strict=True) for _ in range(length)]
            for row, lengths in zip(rows, group, strict=True)
        ]
        for rows, group in zip(values, TURNS, strict=True)
    ]


def process_advantages(scale: str) -> list[list[list[float] | None]]:
    """Section 4.1.3 of arXiv 2402.03300: normalised scores of this turn and the later ones, added up."""
    found: list[list[list[float] | None]] = []
    for rows in TURN_SCORES:
        everything = [score for row in rows if row is not None for score in row]
        mean = sum(everything) / len(everything)
        divisor = statistics.stdev(everything) + 1e-4 if scale == "group" else 1.0
        normalised = [None if row is None else [(score - mean) / divisor for score in row] for row in rows]
        found.append([None if row is None else [sum(row[turn:]) for turn in range(len(row))] for row in normalised])
    return found


def run(loss: Any, batch: Batch, seed: int = 0) -> tuple[LossOutput, torch.Tensor]:
    policy = random_logps(batch, seed)
    output = loss(policy, random_logps(batch, 1) if loss.needs_reference else None, batch)
    output.loss.backward()
    assert policy.token_logps.grad is not None
    return output, policy.token_logps.grad


@pytest.mark.parametrize("rewritten", [False, True], ids=["one part", "two parts"])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_scores_by_turn_are_the_process_supervision_of_grpo(scale: str, rewritten: bool) -> None:
    batch = make_batch(rewritten=rewritten, turn_scores=TURN_SCORES)
    loss = make_loss("grpo", advantages="turn_scores", scale_rewards=scale, old="reference", epsilon=0.1)
    assert loss.columns == ("turn_scores",)
    assert loss.num_units(batch) == 5  # the response without scores is left out
    assert len(loss.select(batch.groups[1])) == 2
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    output = loss(policy, reference, batch)
    total, tokens = 0.0, iter(zip(token_lists(policy), token_lists(reference), strict=True))
    for rows in by_token(process_advantages(scale)):
        for advantages in rows:
            own, other = next(tokens)
            if advantages is None:
                continue
            for advantage, pi, old in zip(advantages, own, other, strict=True):
                ratio = math.exp(pi - old)
                total -= min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage) / len(own)
    assert output.loss.item() == pytest.approx(total / 5, abs=TOLERANCE)
    sums = [sum(row) for rows in TURN_SCORES for row in rows if row is not None]
    assert output.metrics["reward"].item() == pytest.approx(sum(sums) / 5, abs=TOLERANCE)
    assert output.metrics["frac_reward_zero_std"].item() == pytest.approx(1 / 5, abs=TOLERANCE)  # the third group
    assert output.metrics["reward_std"].item() == pytest.approx(
        (2 * statistics.stdev([1.0, 0.0, 0.5, 0.25, 1.0]) + 2 * statistics.stdev([0.0, 1.0, 0.5, 0.5])) / 5,
        abs=TOLERANCE,
    )


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo"])
def test_scores_by_turn_are_advantages_by_token(name: str) -> None:
    """In every method; float32 columns hold the advantages to 1e-7."""
    scored = make_batch(
        turn_scores=[rows if None not in rows else [[0.0, 1.0], [0.2, 0.9], [0.5, 0.5]] for rows in TURN_SCORES]
    )
    found, gradient = run(make_loss(name, advantages="turn_scores", scale_rewards="none", old="reference"), scored)
    given: list[list[list[float]]] = []
    for group in scored.groups:
        everything = [score for row in group.columns["turn_scores"] for score in row]
        mean = sum(everything) / len(everything)
        given.append(
            [
                [sum(row[turn:]) - mean * (len(row) - turn) for turn in range(len(row))]
                for row in group.columns["turn_scores"]
            ]
        )
    for entries in (given, by_token(given)):  # type: ignore[arg-type]
        batch = make_batch(gain=entries)
        expected, slopes = run(make_loss(name, advantages="gain", old="reference"), batch)
        torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient, slopes, rtol=0, atol=1e-6)


def test_old_log_probs_are_per_token_only() -> None:
    drawn = [[[-0.5] * sum(lengths) for lengths in group] for group in TURNS]
    loss = make_loss("grpo", advantages="gain", old="drawn")
    output, _ = run(loss, make_batch(gain=[[1, -1.0], 0.5, [[2.0, 1.0]]], drawn=drawn))
    assert torch.isfinite(output.loss)
    drawn[1][0] = [-0.5, -0.5]
    bad = make_batch(gain=[[1, -1.0], 0.5, [[2.0, 1.0]]], drawn=drawn)
    message = r"file:2: column 'drawn' must hold one number per scored token \(4\) of response 0; found 2"
    with pytest.raises(kvpref.InputError, match=message):
        loss.prepare_batch(bad)
    with pytest.raises(kvpref.InputError, match=message):
        run(loss, bad)


@pytest.mark.parametrize("settings", [{"advantages": "turn_scores"}, {"advantages": "gain", "old": "drawn"}])
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_the_cut_into_micro_batches_does_not_change_the_mean(name: str, settings: dict[str, Any]) -> None:
    drawn = [[[-0.25 * place for place in range(sum(lengths))] for lengths in group] for group in TURNS]
    batch = make_batch(rewritten=True, turn_scores=TURN_SCORES, gain=[[1, [-1.0, 2.0]], 0.5, [[2.0, 1.0]]], drawn=drawn)
    loss = make_loss(name, **settings)
    policy = random_logps(batch, 0)
    parts = micro_batches(batch, [policy])
    found = mean_over_units([loss(own, None, part) for part, own in parts], [loss.num_units(part) for part, _ in parts])
    torch.testing.assert_close(found.loss, loss(policy, None, batch).loss, rtol=0, atol=TOLERANCE)


def test_made_ahead_nothing_is_made_by_the_loss() -> None:
    loss = make_loss("grpo", advantages="turn_scores")
    batch = make_batch(turn_scores=TURN_SCORES)
    loss.prepare_batch(batch)
    made = len(batch._made)
    loss(random_logps(batch, 0), None, batch)
    assert len(batch._made) == made


def test_groups_that_have_nothing_to_learn() -> None:
    groups = make_batch(turn_scores=TURN_SCORES, gain=[[0.0, [0.0, 0.0]], [0, 0, [0.0, 1.0]], 0.0]).groups
    by_turn, given = make_loss("grpo", advantages="turn_scores"), make_loss("grpo", advantages="gain")
    assert [loss.idle(group) is None for loss in (by_turn, given) for group in groups] == [
        *(True, True, False),
        *(False, True, False),
    ]
    idle = by_turn.idle(groups[2])
    assert idle is not None
    assert idle.reason == "no two turns have different scores"
    dynamic = make_loss("dapo", advantages="turn_scores", dynamic_sampling=True)
    assert [dynamic.group_units(group) for group in groups] == [9, 6, 0]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(kvpref.InputError, match="rloo: scores by turn have no baseline of the other responses"):
        make_loss("rloo", advantages="turn_scores")
    loss = make_loss("grpo", advantages="turn_scores")
    with pytest.raises(kvpref.InputError, match="file:1: no column 'turn_scores'"):
        run(loss, make_batch())
    nothing = [[None, None], *TURN_SCORES[1:]]
    with pytest.raises(kvpref.InputError, match="file:1: no response has scores by turn in 'turn_scores'"):
        run(loss, make_batch(turn_scores=nothing))
    per_token = [[[1.0] * 6, [1.0] * 3], *TURN_SCORES[1:]]
    message = r"file:1: column 'turn_scores' must hold one number per turn \(3\) of response 0; found 6"
    with pytest.raises(kvpref.InputError, match=message):
        run(loss, make_batch(turn_scores=per_token))
    wanted = r"a number, or one per scored token \(6\), or one per turn \(3\), of response 0"
    with pytest.raises(kvpref.InputError, match=f"file:1: column 'gain' must hold {wanted}; found high"):
        run(make_loss("grpo", advantages="gain"), make_batch(gain=["high", 0.0, 0.0]))


def test_a_response_without_a_score_has_the_sum_of_its_turns() -> None:
    """For every loss that goes by responses."""
    groups = make_batch(turn_scores=TURN_SCORES).groups
    assert response_scores(groups[0]) == (1.5, 1.25)
    assert response_scores(groups[1]) == (1.0, None, 1.0)
    given = Group(groups[0].sequences, scores=[0.0, None], columns={"turn_scores": TURN_SCORES[0]})
    assert known_scores(given) == (0.0, None), "scores of responses come first"
    pair = kvpref.collate([groups[0]])
    labelled = kvpref.collate([Group(groups[0].sequences, labels=[True, False])])
    policy, reference = random_logps(pair, 0), random_logps(pair, 1)
    for name in ("dpo", "sft", "all_pairs", "grpo"):
        found, expected = (make_loss(name)(policy, reference, batch).loss.item() for batch in (pair, labelled))
        # The 1e-4 that GRPO adds to the deviation counts more where the deviation is small.
        assert found == pytest.approx(expected, abs=1e-4 if name == "grpo" else TOLERANCE), name
    swapped = kvpref.collate(
        [Group(groups[0].sequences, labels=[False, True], columns={"turn_scores": TURN_SCORES[0]})]
    )
    assert make_loss("dpo")(policy, reference, swapped).loss.item() != pytest.approx(
        make_loss("dpo")(policy, reference, pair).loss.item(), abs=1e-3
    ), "labels come first"
    assert make_loss("apo_zero_unpaired", score_threshold=1.3)._desirable(groups[0]) == [True, False]


def test_an_attempt_in_several_parts_is_one_response() -> None:
    """For GRPO over attempts the same as were it one sequence: its tokens are those of its parts one after another."""
    whole, parts = (
        kvpref.collate([Group([response(lengths, rewritten=rewritten) for lengths in TURNS[0]], scores=[1.0, 0.0])])
        for rewritten in (False, True)
    )
    assert (len(parts.parts), len(parts.sequences), parts.num_sequences) == (4, 2, 2)
    assert torch.equal(whole.cu_seqlens, parts.cu_seqlens)
    loss = make_loss("grpo", old="reference", beta=0.1)
    found, gradient = run(loss, parts)
    expected, slopes = run(loss, whole)
    assert loss.num_units(parts) == 2
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(gradient, slopes)
