"""The prefix tree of a group as text."""

from __future__ import annotations

from kvpref.data.tree_picture.group_tree import GroupTree
from kvpref.data.tree_picture.runs import Run, children_of

MAX_LINES = 60
"""Most branches shown; further ones are counted."""


def text_lines(tree: GroupTree) -> list[str]:
    """Title, facts, and a line per branch with its positions, scored tokens, and the sequences that hold or end it."""
    children = children_of(tree.runs)
    lines: list[str] = []
    hidden = 0
    stack = [(index, "", "", "") for index in reversed(children[None])]
    while stack:
        first, before, corner, below = stack.pop()
        chain = _chain(first, children)
        following = children[chain[-1]]
        for place, index in reversed(list(enumerate(following))):
            is_last = place == len(following) - 1
            stack.append((index, before + below, "└─ " if is_last else "├─ ", "   " if is_last else "│  "))
        if len(lines) >= MAX_LINES:
            hidden += 1
            continue
        lines.append(before + corner + _line(tree, [tree.runs[index] for index in chain], is_leaf=not following))
    if hidden:
        lines.append(f"... and {hidden} more branches")
    return [tree.title, tree.facts, *lines]


def _chain(first: int, children: dict[int | None, list[int]]) -> list[int]:
    """A run and its continuation, up to where sequences diverge."""
    chain = [first]
    while len(children[chain[-1]]) == 1:
        chain.append(children[chain[-1]][0])
    return chain


def _line(tree: GroupTree, runs: list[Run], *, is_leaf: bool) -> str:
    start, stop, scored = runs[0].start, runs[-1].stop, sum(run.num_scored for run in runs)
    held = len(runs[0].holders)
    inside = tuple(part for run in (runs[:-1] if is_leaf else runs) for part in run.ending)
    words = [f"{start:,} to {stop:,}", f"{scored:,} scored"]
    if held > 1:
        words.append(f"in {held} of {len(tree.batch.parts)} sequences")
    if inside:
        words.append(f"{len(inside)} end{'s' if len(inside) == 1 else ''} on the way ({tree.label(inside)})")
    return "; ".join(words) + (f": {tree.label(runs[-1].ending)}" if is_leaf else "")
