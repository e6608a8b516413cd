"""Timelines stay small and keep what matters."""

from __future__ import annotations

import random
from itertools import pairwise

from kvpref.profiling.memory.timeline import Sample, Timeline


def test_a_long_timeline_is_thinned_and_keeps_its_highest_point() -> None:
    generator = random.Random(0)
    timeline, now, totals = Timeline(max_points=16), Sample(event=0, region="loss"), []
    for _ in range(1000):
        now.change("other", generator.randrange(-5, 6))
        totals.append(now.total)
        timeline.add(now)
    points = timeline.freeze()
    assert 8 <= len(points) <= 16
    assert max(point.total_bytes for point in points) == max(totals)
    assert [point.event for point in points] == sorted({point.event for point in points})
    assert all(totals[point.event - 1] == point.total_bytes for point in points)
    # even steps: no stretch without a point is longer than two strides
    gaps = [later.event - earlier.event for earlier, later in pairwise(points)]
    assert max(gaps) <= 2 * 128


def test_a_sample_that_moves_bytes_keeps_its_total() -> None:
    sample = Sample(event=0, region=None)
    sample.change("backward", 7)
    before = sample.freeze()
    sample.move(7, "backward", "gradients")
    assert before.bytes_by_category == {"backward": 7}
    assert sample.freeze().bytes_by_category == {"gradients": 7}
    assert sample.freeze().total_bytes == before.total_bytes == 7
