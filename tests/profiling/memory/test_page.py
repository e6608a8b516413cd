"""Pictures and the page: self-contained, complete, and rendered by a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from kvpref import InputError
from kvpref.profiling.memory import plot as memory_plot
from kvpref.profiling.memory.profile import MemoryProfile
from kvpref.profiling.memory.report import MemoryReport, format_bytes, peaks_table, timeline_columns
from kvpref.profiling.memory.step import KeyValueSize, PrefixSize
from kvpref.profiling.memory.style import fill_style, in_order, line_style
from kvpref.profiling.memory.timeline import MemorySnapshot
from kvpref.profiling.provenance import Provenance

MIB = 2**20
PARTS = {"parameters": 10 * MIB, "activations pass 0": 20 * MIB, "backward": 5 * MIB}


def make_profile(variant: str, count: int) -> MemoryProfile:
    points = tuple(
        MemorySnapshot(
            total_bytes=10 * MIB + height * MIB,
            bytes_by_category={"parameters": 10 * MIB, "activations pass 0": height * MIB},
            region="pass 0" if height < 20 else "backward",
            event=height,
        )
        for height in range(count + 20)
    )
    peak = MemorySnapshot(total_bytes=35 * MIB * count, bytes_by_category=PARTS, region="backward")
    return MemoryProfile(
        name=f"{variant} N={count}",
        variant=variant,
        num_responses=count,
        facts={"num_sequences": count},
        peak=peak,
        tracked_bytes=35 * MIB,
        allocated_bytes=35 * MIB,
        reserved_bytes=None,
        peak_by_region={"backward": peak},
        prefix_bytes=960,
        prefix_size=PrefixSize(
            layers=(KeyValueSize(num_layers=2, num_kv_heads=3, key_dim=4, value_dim=4),), num_tokens=5, itemsize=4
        ),
        timeline=points,
        allocator_snapshot=None,
    )


@pytest.fixture(scope="module")
def report() -> MemoryReport:
    return MemoryReport(
        title="<model> & data",
        provenance=Provenance.collect(torch.device("cpu")),
        settings={"loss": "likelihood"},
        profiles=tuple(make_profile(variant, count) for count in (2, 8) for variant in ("full", "packed")),
        skipped={"padded N=8": "out of device memory"},
    )


@pytest.fixture(scope="module")
def page(report: MemoryReport) -> str:
    pytest.importorskip("matplotlib")
    from kvpref.profiling.memory.page import render_page

    return render_page(report)


class _Reader(HTMLParser):
    """Collects what a page consists of, and checks that its tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_complete_and_well_formed(page: str) -> None:
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.tags.count("svg") == 2 + 4  # peaks, breakdown, one timeline per profile
    assert len(reader.ids) == len(set(reader.ids))
    assert "&lt;model&gt; &amp; data" in page
    assert "<model>" not in page
    for text in ("full N=8", "padded N=8", "out of device memory", "2 x 2 layers x 3 KV heads", "960 bytes"):
        assert text in page


def test_the_page_asks_for_nothing(page: str) -> None:
    assert "default-src 'none'" in page
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not requests
    assert not re.search(r"<(script|img|link|iframe|object)|@import|url\((?!#)", page)
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert used
    assert used <= set(re.findall(r'\bid="([^"]+)"', page))


def test_a_browser_renders_the_page(tmp_path: Path, page: str) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium here; apt-get install chromium")
    path, picture = tmp_path / "memory.html", tmp_path / "memory.png"
    path.write_text(page, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

    def run(*arguments: str) -> str:
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [browser, *flags, profile, "--window-size=1200,2400", *arguments, path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=1200, check=True).stdout

    dumped = run("--dump-dom")
    assert dumped.count("<svg") == 6
    assert dumped.count("<table") == page.count("<table")
    run(f"--screenshot={picture}")
    matplotlib_image = pytest.importorskip("matplotlib.image")
    pixels = matplotlib_image.imread(picture)[..., :3]
    # The dark grey of the parameters and the green of activations, in bars and timelines.
    for color in ("parameters", "activations pass 0"):
        wanted = [int(fill_style(color).color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        assert (abs(pixels - wanted).max(axis=-1) < 0.01).sum() > 1000


def test_the_picture_is_written(tmp_path: Path, report: MemoryReport) -> None:
    pytest.importorskip("matplotlib")
    memory_plot.draw_report(report, tmp_path / "new" / "memory.png")
    assert (tmp_path / "new" / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r'pip install "kvpref\[plot\]"'):
        memory_plot.require_matplotlib()


def test_thinning_keeps_the_ends_and_the_highest_point() -> None:
    heights = [1, 2, 9, 3, 2, 1, 4, 1, 1, 0]
    points = [
        MemorySnapshot(total_bytes=height, bytes_by_category={}, region=None, event=event)
        for event, height in enumerate(heights)
    ]
    assert [point.total_bytes for point in memory_plot.thin(points, 4)] == [1, 9, 4, 0]
    assert memory_plot.thin(points, 10) == points


def test_json_is_whole_and_timelines_are_columns(tmp_path: Path, report: MemoryReport) -> None:
    report.write(tmp_path / "new" / "memory.json")
    written = json.loads((tmp_path / "new" / "memory.json").read_text())
    assert written == report.to_json()
    first = written["profiles"][0]
    assert first["prefix_size"]["num_bytes"] == 2 * 2 * 3 * 4 * 5 * 4
    assert first["timeline"] == timeline_columns(report.profiles[0].timeline)
    columns = first["timeline"]
    assert len(columns["event"]) == len(columns["region"]) == len(columns["bytes"]["parameters"]) == 22


def test_the_table_has_a_column_per_number_of_responses(report: MemoryReport) -> None:
    table = peaks_table(report)
    assert [column.header for column in table.columns] == ["variant", "N = 2", "N = 8"]
    assert [list(column.cells) for column in table.columns] == [
        ["full", "packed"],
        ["70.0 MiB", "70.0 MiB"],
        ["280 MiB", "280 MiB"],
    ]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1024, "1.00 KiB"),
        (743 * MIB, "743 MiB"),
        (1000 * MIB, "0.98 GiB"),
        (12345, "12.1 KiB"),
    ],
)
def test_bytes_have_three_digits(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_categories_that_stand_beside_one_another_look_different() -> None:
    names = ["other", "activations pass 1", "backward", "parameters", "activations pass 0", "prefix K/V", "log-probs"]
    names += ["activations vision tower", "image features", "pixel inputs", "image feature gradients"]
    assert in_order(names) == [
        *("parameters", "prefix K/V", "pixel inputs", "image features", "image feature gradients"),
        *("activations vision tower", "activations pass 0", "activations pass 1", "log-probs", "backward", "other"),
    ]
    assert len({fill_style(name) for name in names}) == len(names)
    lines = [line_style(name) for name in ("full", "bounded", "one_pass", "packed", "padded")]
    assert len({line.marker for line in lines}) == len({str(line.dash) for line in lines}) == 5
