"""The picture: everything is on it, nothing is cut off, and no two bars cover one another."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvpref import Group, Sequence
from kvpref.data.tree_picture.drawing import check_picture, draw_tree, place_runs
from kvpref.data.tree_picture.group_tree import GroupTree
from kvpref.data.tree_picture.runs import children_of
from kvpref.data.tree_picture.style import THICK, color_of, height_of, legend_counts, pale
from kvpref.errors import InputError

pytest.importorskip("matplotlib", reason="pictures need the extra kvpref[plot]")
PROMPT, TRUNK = list(range(100, 120)), list(range(200, 220))


@pytest.fixture
def tree() -> GroupTree:
    responses = ([*TRUNK, 1, 2], [3], TRUNK, [*TRUNK, 4, 5, 6])
    sequences = [Sequence.from_prompt_and_response(PROMPT, response) for response in responses]
    return GroupTree.of(Group(sequences, scores=[0, 1, 0, 0.5], id="a/rows.jsonl:7"))


def test_runs_stand_midway_of_what_follows(tree: GroupTree) -> None:
    places = place_runs(tree.runs, children_of(tree.runs))
    by_run = {(run.start, run.holders): place for run, place in zip(tree.runs, places, strict=True)}
    assert by_run == {
        (40, (0,)): 0, (40, (3,)): 1, (20, (1,)): 2, (20, (0, 2, 3)): 0.5, (0, (0, 1, 2, 3)): 1.25
    }  # fmt: skip


def test_all_is_said_in_the_picture(tree: GroupTree, tmp_path: Path) -> None:
    path = tmp_path / "new" / "tree.svg"
    draw_tree(tree, path)
    text = path.read_text()
    ElementTree.fromstring(text)
    said = re.sub(r"<[^>]*>", "\n", text)
    for words in (tree.title, tree.facts, "response 1, score 0", "response 2, score 1", "response 4, score 0.5"):
        assert words in said
    for words in ("in all 4 sequences", "in 3 sequences", "in one sequence", "token position", "this response ends"):
        assert words in said
    # The trunk that three of four hold, filled because it is scored.
    assert f"fill: {color_of(3, 4)}" in text
    assert f"fill: {pale(color_of(4, 4))}" in text
    draw_tree(tree, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text


@pytest.mark.parametrize("num_responses", [1, 2, 60])
def test_no_text_is_cut_off(num_responses: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    sequences = [Sequence.from_prompt_and_response(PROMPT, [token, 99]) for token in range(num_responses)]
    group = Group(sequences, scores=[0.123456] * num_responses, id=f"{'w' * 90}.jsonl:1")
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kwargs: (drawn.append(figure), save(figure, *args, **kwargs))
    )
    draw_tree(GroupTree.of(group), tmp_path / "tree.png")
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    renderer = figure.canvas.get_renderer()
    (ax,) = figure.axes
    texts = [*ax.texts, ax._left_title, ax.xaxis.label, *ax.get_yticklabels(), *figure.legends[0].get_texts()]
    assert len(texts) > 5
    for text in texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1


def test_bars_have_room_and_differ() -> None:
    for count in (1, 2, 3, 100):
        # Places of runs at one position are at least 1 apart.
        assert all(height_of(holders, count) <= THICK < 1 for holders in range(1, count + 1))
    assert len({color_of(holders, 6) for holders in range(1, 7)}) == 6
    assert len({height_of(holders, 6) for holders in range(1, 7)}) == 6
    assert color_of(2, 2) == color_of(9, 9)
    assert legend_counts(set(range(1, 100))) == [1, 25, 50, 75, 99]


def test_what_cannot_be_drawn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"tree.gif: pictures end in one of .svg, .png, .pdf"):
        check_picture(Path("tree.gif"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install"):
        check_picture(Path("tree.svg"))
