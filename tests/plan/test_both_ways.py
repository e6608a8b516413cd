"""Plans in which images, or whole prompts, see both ways."""

from __future__ import annotations

import pytest

import kvpref
from kvpref import Group, Image, PlacedImage, Sequence
from kvpref.plan.flops import count_work
from kvpref.plan.passes import Reads
from kvpref.prefix.rules import Rule

PLACEHOLDER = 9
IMAGES, PROMPTS = Reads(spans="images"), Reads(spans="prompts")
BOTH_WAYS = Rule("causal", bidirectional=True)


def image(key: str, num_tokens: int = 4) -> Image:
    return Image(key=key, token_id=PLACEHOLDER, num_tokens=num_tokens, read=dict)


def sequence(*parts: Image | list[int], response: list[int]) -> Sequence:
    ids: list[int] = []
    placed = []
    for part in parts:
        if isinstance(part, Image):
            placed.append(PlacedImage(part, ((len(ids), len(ids) + part.num_tokens),)))
            ids.extend([PLACEHOLDER] * part.num_tokens)
        else:
            ids.extend(part)
    return Sequence([*ids, *response], [False] * len(ids) + [True] * len(response), placed)


def group(*parts: Image | list[int]) -> Group:
    return Group([sequence(*parts, response=[20 + number, 3]) for number in range(2)])


@pytest.mark.parametrize("mode", ["two_pass", "one_pass", "packed"])
def test_pairs_of_images_are_counted(mode: str) -> None:
    batch = kvpref.collate([group([1, 2], image("a"), [3], image("b", 5), [4])], reads=IMAGES, min_shared_tokens=1)
    work = count_work(batch.plan(mode), [BOTH_WAYS])
    more = (4 * 3 // 2 + 5 * 4 // 2) * (2 if mode == "packed" else 1)
    assert work.pairs_under(BOTH_WAYS) == work.num_pairs + more
    assert count_work(batch.reading(Reads()).plan(mode), [BOTH_WAYS]).pairs_under(BOTH_WAYS) == work.num_pairs


def test_only_the_images_of_a_batch_with_both_kinds_of_groups_do() -> None:
    batch = kvpref.collate([group([1, 2, 5]), group([1, 2], image("a", 6), [4])], reads=IMAGES, min_shared_tokens=1)
    assert [layout.spans for item in batch.plan("two_pass").passes for layout in item.layouts] == [
        (),
        ((1, 7),),  # behind the rest of the prompt without an image
        (),
    ]
    assert batch.plan("padded").passes[0].spans_of_rows == ((), (), ((2, 8),), ((2, 8),))


def test_images_side_by_side_are_one_run_and_shared_together_or_not_at_all() -> None:
    first, second, third = image("a"), image("b"), image("c")
    neighbours = [group([1, 2], first, second), group([1, 2], first, third)]
    batch = kvpref.collate(neighbours, reads=IMAGES, min_shared_tokens=1)
    apart = kvpref.collate([group([1, 2], first, [3], second), group([1, 2], first, [3], third)], min_shared_tokens=1)
    assert batch.sequences[0].image_runs == ((2, 10),)
    assert batch.num_unique_tokens == 2 + 2 * 8 + 4 * 2
    assert apart.num_unique_tokens == 7 + 2 * 4 + 4 * 2
    assert batch.plan("two_pass").passes[1].layouts[0].spans == ((0, 8), (8, 16))


def test_a_batch_for_whole_prompts_shares_no_part_of_one() -> None:
    groups = [group(image("a", 20), [3, 4]), group(image("a", 20), [3, 5]), group([1] * 18)]
    batch = kvpref.collate(groups)
    assert batch.num_unique_tokens < 2 * 22 + 18 + 6 * 2
    for whole in (batch.reading(PROMPTS), kvpref.collate(groups, reads=PROMPTS)):
        assert whole.sharing.whole_prompts
        assert whole.num_unique_tokens == 2 * 22 + 18 + 6 * 2
        assert whole.plan("two_pass").passes[0].layouts[0].spans == ((0, 22), (22, 44), (44, 62))
        assert kvpref.join_batches([whole, whole], max_tokens_per_chunk=8).chunks.max_chunk_tokens == 22


def test_chunks_longer_than_the_bound_hold_one_image_whole() -> None:
    batch = kvpref.collate([group([1, 2], image("a", 12), [4, 5, 6])], reads=IMAGES)
    chunks = kvpref.join_batches([batch], max_tokens_per_chunk=5).chunks
    assert [chunk.num_tokens for chunk in chunks.all] == [2, 12, 3, 4]
    assert (chunks.max_chunk_tokens, chunks.longest_span) == (12, 12)
    bound = kvpref.join_batches([batch.reading(Reads())], max_tokens_per_chunk=5).chunks
    assert (bound.max_chunk_tokens, bound.longest_span) == (5, 0)


def test_unknown_spans_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown spans 'videos'"):
        Reads(spans="videos")
