"""Clusters of groups that begin alike, against a quadratic definition where that is possible."""

from __future__ import annotations

import pickle
import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpref.data import DataOptions, PreferenceDataset, find_clusters, load_preferences, load_tokenizer
from kvpref.data.batching.sharing import as_wholes
from kvpref.errors import InputError
from kvpref.prefix.radix import shared_prefix_length
from kvpref.records.groups import Group, Sequence

beginnings = st.lists(st.lists(st.integers(0, 1), max_size=8), max_size=30)


def made_up(*stories: tuple[int, int, int], seed: int = 0) -> list[list[int]]:
    """Per story (tokens, questions, tokens of a question) its beginnings, all of them mixed up."""
    generator = random.Random(seed)

    def fresh(count: int) -> list[int]:
        return [generator.randrange(50_000) for _ in range(count)]

    rows = []
    for length, number, question in stories:
        story = fresh(length)
        rows += [story + fresh(question) for _ in range(number)]
    generator.shuffle(rows)
    return rows


def members(clusters) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for group, cluster in enumerate(clusters.of_group):
        found.setdefault(cluster, []).append(group)
    return list(found.values())


@given(beginnings, st.integers(1, 6), st.integers(1, 4))
def test_clusters_are_a_partition_that_shares_what_it_says(rows, groups_per_step, min_shared_tokens):
    clusters = find_clusters(rows, groups_per_step=groups_per_step, min_shared_tokens=min_shared_tokens)
    assert len(clusters.of_group) == len(clusters.shared_tokens) == len(rows)
    for own in members(clusters):
        assert clusters.of_group[own[0]] == own[0] == min(own)
        tokens = {clusters.shared_tokens[group] for group in own}
        if len(own) == 1:
            assert tokens == {0}
            continue
        shared = min(shared_prefix_length(rows[own[0]], rows[group]) for group in own)
        assert tokens == {shared}
        assert shared >= min_shared_tokens
        # Exactly the groups that begin so.
        assert own == [group for group, row in enumerate(rows) if row[:shared] == rows[own[0]][:shared]]
        assert len(own) < len(rows)
        assert len(own) <= groups_per_step or len(own) * groups_per_step <= len(rows)
    assert clusters.largest == max(map(len, members(clusters)), default=0)
    assert clusters.num_sharing_groups == sum(len(own) for own in members(clusters) if len(own) > 1)


@given(beginnings, st.integers(1, 6), st.randoms(use_true_random=False))
def test_the_order_of_groups_and_the_kind_of_list_do_not_matter(rows, groups_per_step, generator):
    clusters = find_clusters(rows, groups_per_step=groups_per_step, min_shared_tokens=1)
    packed = [array("i", row) for row in rows]
    assert find_clusters(packed, groups_per_step=groups_per_step, min_shared_tokens=1) == clusters
    order = list(range(len(rows)))
    generator.shuffle(order)
    moved = find_clusters([rows[group] for group in order], groups_per_step=groups_per_step, min_shared_tokens=1)
    assert sorted(sorted(order[place] for place in own) for own in members(moved)) == sorted(members(clusters))


def test_stories_with_questions_are_clusters():
    rows = made_up((200, 5, 20), (150, 3, 20), (300, 1, 20), (10, 4, 20))
    clusters = find_clusters(rows, groups_per_step=8, min_shared_tokens=16)
    assert sorted(map(len, members(clusters))) == [1, 1, 1, 1, 1, 3, 5]
    assert set(clusters.shared_tokens) == {0, 150, 200}
    assert (clusters.num_sharing_groups, clusters.largest) == (8, 5)


def test_what_all_rows_begin_with_makes_no_cluster_and_does_not_count_below():
    few_shot, (_, *stories) = [7] * 300, made_up((1, 1, 0), (40, 4, 20), (10, 4, 20))
    clusters = find_clusters([few_shot + row for row in stories], groups_per_step=4, min_shared_tokens=16)
    # 340 and 310 tokens are shared, of which 300 everywhere.
    assert sorted(map(len, members(clusters))) == [1, 1, 1, 1, 4]
    assert set(clusters.shared_tokens) == {0, 340}


@pytest.mark.parametrize(("share", "gathered"), [(99, False), (50, False), (11, False), (10, True), (5, True)])
def test_a_system_prompt_of_most_steps_makes_no_cluster(share, gathered):
    """With ten groups per step and a hundred groups, ten groups are one per step."""
    rows = [*made_up((200, share, 20)), *made_up(*[(1, 1, 20)] * (100 - share), seed=1)]
    clusters = find_clusters(rows, groups_per_step=10, min_shared_tokens=16)
    assert clusters.largest == (share if gathered else 1)


def test_of_nested_beginnings_those_that_spare_most_are_chosen():
    def largest(*rows: list[list[int]]) -> list[int]:
        others = made_up(*[(1, 1, 9)] * 200, seed=5)
        found = find_clusters([row for part in rows for row in part] + others, groups_per_step=8, min_shared_tokens=16)
        return [len(own) for own in members(found) if len(own) > 1]

    licence = [1] * 20
    stories = [[licence + row for row in made_up((500, 3, 9), seed=seed)] for seed in (1, 2)]
    assert largest(*stories) == [3, 3]
    story = [2] * 500
    questions = [[story + row for row in made_up((20, 2, 9), seed=seed)] for seed in (3, 4)]
    assert largest(*questions) == [4]
    # One story with more questions than a step has groups is still better gathered, then cut, than its pair alone.
    many = [story + row for row in made_up((20, 2, 9), *[(1, 1, 9)] * 10, seed=6)]
    assert largest(many) == [12]


def test_chains_as_long_as_the_data_need_no_recursion():
    rows = [[1] * length for length in range(3000)]
    clusters = find_clusters(rows, groups_per_step=8, min_shared_tokens=16)
    assert clusters.largest <= 3000 / 8
    assert sum(map(len, members(clusters))) == 3000


@pytest.mark.parametrize("wrong", [{"groups_per_step": 0}, {"min_shared_tokens": 0}])
def test_numbers_are_checked(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be at least 1; got 0"):
        find_clusters([[1]], **({"groups_per_step": 1, "min_shared_tokens": 1} | wrong))


def story_group(story: int, question: int, *responses: list[int]) -> Group:
    prompt = [story] * 20 + [question] * 5
    return Group([Sequence.from_prompt_and_response(prompt, response) for response in responses])


def test_a_dataset_clusters_its_groups_once_and_keeps_them_when_pickled():
    dataset = PreferenceDataset(
        [story_group(1, 1, [5, 6], [5, 7]), story_group(2, 2, [5]), story_group(1, 3, [5], [6]), story_group(3, 1, [5])]
    )
    clusters = dataset.clusters(2, 16)
    assert clusters.of_group == (0, 1, 0, 3)
    assert clusters.shared_tokens == (20, 0, 20, 0)
    assert dataset.clusters(2, 16) is clusters
    assert dataset.clusters(2, 21).num_sharing_groups == 0
    assert pickle.loads(pickle.dumps(dataset)).clusters(2, 16) == clusters


def test_scored_tokens_and_what_a_group_itself_does_not_share_do_not_count():
    alike, prompt = [1] * 30, [2] * 20
    group = Group([Sequence.from_prompt_and_response(prompt, alike), Sequence.from_prompt_and_response(prompt, [3])])
    # Its prompts differ after 17 tokens, as where a tokenizer merges the last of them with the response.
    merged = Group([Sequence.from_prompt_and_response(prompt, alike)] * 2)
    merged = Group([merged.sequences[0], Sequence.from_prompt_and_response([*prompt[:17], 9], [4])])
    other = Group([Sequence.from_prompt_and_response([5], [6])])
    assert PreferenceDataset([group, group, other, other]).clusters(2, 16).shared_tokens == (20, 20, 0, 0)
    assert PreferenceDataset([group, merged, other, other]).clusters(2, 16).shared_tokens == (17, 17, 0, 0)


@pytest.mark.full
def test_real_stories_are_found_and_one_few_shot_prompt_is_not(shared_dir):
    tokenizer = load_tokenizer(str(shared_dir / "tokenizers" / "gpt_neox_20b"))

    def clusters(name: str):
        dataset = load_preferences(str(shared_dir / "data" / f"{name}.jsonl"), tokenizer, DataOptions())
        return dataset.clusters(16, 16)

    # 20 stories with five questions each; some begin with the same licence.
    assert [len(own) for own in members(clusters("squality_groups"))] == [5] * 20
    assert clusters("game24_groups").num_sharing_groups == 0


def test_wholes_begin_alike_only_where_they_end_alike():
    beginnings = [array("i", tokens) for tokens in ([1, 2, 3], [1, 2], [1, 2, 3], [1, 2, 4])]
    wholes = as_wholes([*beginnings, array("q", [1, 2, 3])])  # wider, as where images are
    assert [len(item) for item in wholes] == [3, 2, 3, 3, 3]
    assert wholes[0] == wholes[2] == wholes[4]
    assert len({item[0] for item in wholes}) == 3
    found = find_clusters(wholes[:4], groups_per_step=2, min_shared_tokens=1)
    assert (found.of_group, found.shared_tokens) == ((0, 1, 0, 3), (3, 0, 3, 0))
