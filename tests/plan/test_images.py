"""Images in batches: what is shared, and which rows of a plan stand for which features."""

import pickle
from functools import partial

import pytest
import torch

from kvpref import Group, Image, PlacedImage, Sequence, collate, join_batches

PLACEHOLDER = 9


def pixels(value):
    return {"pixel_values": torch.full((1, 2), float(value))}


def image(key, num_tokens=20):
    return Image(key=key, token_id=PLACEHOLDER, num_tokens=num_tokens, read=partial(pixels, len(key)))


def group(prompt_image, *, num_responses=2, question=(5, 6), first=20):
    size = prompt_image.num_tokens
    prompt = [1, 2, *[PLACEHOLDER] * size, *question]
    placed = (PlacedImage(prompt_image, ((2, 2 + size),)),)
    scored = [False] * len(prompt) + [True, True]
    responses = [[*prompt, first + number, 3] for number in range(num_responses)]
    return Group([Sequence(ids, scored, placed) for ids in responses])


def test_equal_text_with_other_images_shares_no_placeholder():
    same = collate([group(image("a")), group(image("a"), first=40)])
    other = collate([group(image("a")), group(image("b"), first=40)])
    assert same.num_unique_tokens == 24 + 4 * 2
    assert other.num_unique_tokens == 2 * 24 + 4 * 2  # the two tokens before the image are too few for a segment
    assert collate([group(image("a")), group(image("b"))], min_shared_tokens=1).num_unique_tokens == 2 + 2 * 22 + 8


def test_segments_hold_the_real_tokens():
    batch = collate([group(image("a")), group(image("b"))])
    for number, sequence in enumerate(batch.sequences):
        assert batch.tree.sequence(number) == sequence.input_ids


def seen(plan, batch):
    """Per token of every sequence that stands for an image: (image key, offset), read off the passes."""
    table = [(item.key, offset) for item in plan.images for offset in range(item.num_tokens)]
    found = {}
    for item in plan.passes:
        index = dict(zip(item.image_rows.tolist(), item.image_index.tolist(), strict=True))
        row = 0
        for number, first, stop in item.row_runs:
            for position in range(first, stop):
                if row in index:
                    found[number, position] = table[index[row]]
                row += 1
        assert row == item.input_ids.numel()
        assert set(index) <= set(range(row))
        assert not item.input_ids.view(-1)[item.image_rows].any()
    return found


@pytest.mark.parametrize(("mode", "num_images"), [("two_pass", 2), ("one_pass", 2), ("packed", 6)])
def test_rows_stand_for_the_features_of_their_sequence(mode, num_images):
    batch = collate([group(image("a")), group(image("bb", 30)), group(image("a"), question=(7,))])
    plan = batch.plan(mode)
    assert len(plan.images) == num_images
    found = seen(plan, batch)
    holders = {number for number, _ in found}
    for (number, position), (key, offset) in found.items():
        (placed,) = batch.sequences[number].images
        assert placed.image.key == key
        assert placed.runs[0][0] + offset == position
    assert mode != "packed" or holders == set(range(6))


def test_padded_rows_stand_for_each_sequences_own_image():
    batch = collate([group(image("a")), group(image("bb", 30))])
    plan = batch.plan("padded")
    (only,) = plan.passes
    assert [item.key for item in plan.images] == ["a", "a", "bb", "bb"]
    rows, columns = only.image_rows // only.input_ids.shape[1], only.image_rows % only.input_ids.shape[1]
    assert only.image_index.tolist() == list(range(2 * 20 + 2 * 30))
    assert rows.tolist() == [0] * 20 + [1] * 20 + [2] * 30 + [3] * 30
    assert columns.tolist() == [*range(2, 22)] * 2 + [*range(2, 32)] * 2


def test_micro_batches_of_a_step_share_an_image():
    batches = [collate([group(image("a"))]), collate([group(image("a"), first=40), group(image("bb"))])]
    step = join_batches(batches, max_tokens_per_chunk=8)
    chunks = step.chunks
    assert [item.key for item in chunks.images] == ["a", "bb"]
    assert sorted(int(row) for chunk in chunks.all for row in chunk.item.image_index) == list(range(40))
    assert set(step.image_inputs()) == {"a", "bb"}


def test_images_are_read_once_when_asked_for():
    calls = []

    class Counted:
        def __call__(self):
            calls.append(1)
            return pixels(1)

    counted = Image("a", PLACEHOLDER, 20, Counted())
    batch = collate([group(counted), group(counted, first=40)])
    assert not calls
    assert list(batch.image_inputs()) == ["a"]
    assert batch.image_inputs()["a"]["pixel_values"].sum() == 2
    assert len(calls) == 1
    assert (
        pickle.loads(pickle.dumps(group(image("a")))).sequences[0].tree_ids.tolist()
        == group(image("a")).sequences[0].tree_ids.tolist()
    )


@pytest.mark.parametrize("limit", [1, 16])
def test_whole_prompts_are_shared_as_wholes_or_not_at_all(limit):
    first, second = group(image("a"), question=(5, 6)), group(image("a"), question=(5, 7), first=40)
    parts = collate([first, second], min_shared_tokens=limit)
    whole = collate([first, second, group(image("a"), first=60)], min_shared_tokens=limit, whole_prompts=True)
    assert parts.num_unique_tokens < 24 * 2 + 8
    assert whole.num_unique_tokens == 24 * 2 + 6 * 2
    assert {segment.start for segment in whole.tree.segments} == {0, 24}


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (((2, 21),), "20 placeholders, and its runs 19"),
        (((3, 23),), "is not placeholder 9"),
        (((12, 22), (2, 12)), "out of order"),
        (((2, 2), (2, 22)), "empty"),
    ],
)
def test_runs_that_do_not_fit_are_refused(runs, message):
    ids = [1, 2, *[PLACEHOLDER] * 20, 5]
    with pytest.raises(ValueError, match=message):
        Sequence(ids, [False] * len(ids), [PlacedImage(image("a"), runs)])


def test_scored_placeholders_are_refused():
    ids = [1, 2, *[PLACEHOLDER] * 20]
    with pytest.raises(ValueError, match="are scored"):
        Sequence(ids, [False] * 21 + [True], [PlacedImage(image("a"), ((2, 22),))])
