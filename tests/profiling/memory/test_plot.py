"""The words of pictures of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pictures import check_words, figures_drawn

from kvpref.profiling.memory.plot import draw_report, plot_timeline, render_svg
from kvpref.profiling.memory.profile import MemoryProfile
from kvpref.profiling.memory.report import MemoryReport
from kvpref.profiling.memory.step import KeyValueSize, PrefixSize
from kvpref.profiling.memory.timeline import MemorySnapshot
from kvpref.profiling.provenance import Provenance

pytest.importorskip("matplotlib")
GIB = 2**30
KINDS = ("parameters", "optimizer", "gradients", "prefix K/V", "prefix K/V gradients")
HELD = dict.fromkeys((*KINDS, *(f"activations pass {depth}" for depth in range(6))), GIB)


def snapshot(event: int, region: str | None) -> MemorySnapshot:
    return MemorySnapshot(total_bytes=len(HELD) * GIB, bytes_by_category=HELD, region=region, event=event)


@pytest.mark.parametrize("num_plots", [1, 2])
def test_names_of_regions_do_not_lie_on_one_another(num_plots: int) -> None:
    """Passes of all lengths, short ones first: what has no room gets a shorter name or none."""
    regions = [f"{kind}pass {depth}" for depth in range(6) for kind in ("", "recompute ", "backward ")]
    points = [snapshot(0, None)]
    for index, region in enumerate(regions):
        points += [snapshot(points[-1].event + step, region) for step in (1, 1 + 3 * index)]
    with figures_drawn() as figures:
        render_svg(
            [lambda ax: plot_timeline(ax, points)] * num_plots, (9 if num_plots == 1 else 13, 3.4), name="t", label=""
        )
    check_words(figures[0])
    names = [text.get_text() for text in figures[0].axes[0].texts if text.get_text()]
    assert "b5" in names or "backward pass 5" in names
    assert "p0" not in names


@pytest.mark.parametrize("counts", [(None,), (2, 8), (2, 3, 4, 64)])
def test_all_words_of_a_report_have_room(counts: tuple[int | None, ...], tmp_path: Path) -> None:
    variants = ("full", "bounded", "one_pass", "packed", "padded")
    profiles = tuple(
        MemoryProfile(
            name=variant,
            variant=variant,
            num_responses=count,
            facts={},
            peak=snapshot(0, None),
            tracked_bytes=GIB,
            allocated_bytes=GIB,
            reserved_bytes=None,
            peak_by_region={},
            prefix_bytes=1,
            prefix_size=PrefixSize(
                layers=(KeyValueSize(num_layers=1, num_kv_heads=1, key_dim=1, value_dim=1),), num_tokens=1, itemsize=4
            ),
            timeline=(),
            allocator_snapshot=None,
        )
        for count in counts
        for variant in variants
    )
    report = MemoryReport(
        title="", provenance=Provenance.collect(torch.device("cpu")), settings={}, profiles=profiles, skipped={}
    )
    with figures_drawn() as figures:
        draw_report(report, tmp_path / "memory.png")
    check_words(figures[0])
