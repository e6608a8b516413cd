"""A memory report as one HTML page that opens without a network: style, pictures and tables are inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from kvpref.atomic_files import write_text
from kvpref.profiling.memory.plot import Plot, breakdown_plots, plot_peaks, plot_timeline, render_svg
from kvpref.profiling.memory.profile import MemoryProfile
from kvpref.profiling.memory.report import MemoryReport, case_label, format_bytes
from kvpref.profiling.memory.style import in_order

# Browsers may load nothing, so that a mistake shows as a missing picture and never as a request.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto;
  max-width: 68rem; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.note { color: #555; font-size: .87rem; margin: .2rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .22rem .75rem; text-align: right; border-bottom: 1px solid #e3e3e3; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid #888; }
tr.total td { font-weight: 600; border-top: 2px solid #888; }
.columns { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: flex-start; }
svg { width: 100%; height: auto; }
figure { margin: .75rem 0; }
details { border: 1px solid #ddd; border-radius: 6px; padding: .4rem .9rem; margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
code { font-size: .92em; overflow-wrap: anywhere; }
@media print { details { break-inside: avoid; } }
"""


def write_page(report: MemoryReport, path: Path) -> None:
    """Write the page, and the folder if it is missing.

    Raises:
        InputError: If matplotlib, which draws the pictures, is not installed.
    """
    write_text(path, render_page(report))


def render_page(report: MemoryReport) -> str:
    """The page as text.

    Raises:
        InputError: If matplotlib, which draws the pictures, is not installed.
    """
    largest = report.largest()
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        '<p class="note">Memory of a training step: forward, backward and optimizer.</p>',
        f'<p class="note">{escape(report.provenance.line())}</p>',
        "<h2>Peak memory</h2>",
        _peaks(report),
    ]
    if len(report.responses) > 1:
        parts.append(_figure([lambda ax: plot_peaks(ax, report)], (9, 3.9), "peaks", "Peak memory by responses"))
    if report.skipped:
        parts.append(_table(("not measured", "reason"), list(report.skipped.items())))
    if largest:
        suffix = "" if largest[0].num_responses is None else f", {case_label(largest[0].num_responses)}"
        parts += [
            f"<h2>Held at the peak{suffix}</h2>",
            _figure(breakdown_plots(largest), (11, 4.2), "breakdown", "What was held at the peak"),
            _breakdown(largest),
            '<p class="note">activations pass d: made in the forward of depth d of the prefix tree and still alive; '
            "activations vision tower: the same of images; "
            "backward: temporaries of the backward pass; other: the batch, and what the allocator counted beyond the "
            "tracker (workspace of kernels, rounding).</p>",
        ]
    parts.append(
        "<h2>Over the step</h2>"
        '<p class="note">By the tracker, over the storages made and freed, not over time; the names of regions stand '
        "above (p2: pass 2, b2: backward pass 2, r2: recompute pass 2).</p>"
    )
    others = [profile for profile in report.profiles if profile not in largest]
    parts += [_profile(profile, index, is_open=index < len(largest)) for index, profile in enumerate(largest + others)]
    parts += ["<h2>Settings</h2>", _settings(report.settings)]
    return _document(report.title, "\n".join(parts))


def _document(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _figure(plots: Sequence[Plot], size: tuple[float, float], name: str, label: str) -> str:
    return f"<figure>{render_svg(plots, size, name=name, label=escape(label))}</figure>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, last_is_total: bool = False) -> str:
    """Cells are text; the first column is aligned left."""
    found = list(rows)
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head) + "</tr>"]
    body = []
    for index, row in enumerate(found):
        kind = ' class="total"' if last_is_total and index == len(found) - 1 else ""
        body.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    head_text, body_text = "".join(lines), "\n".join(body)
    return f'<div class="scroll"><table><thead>{head_text}</thead><tbody>\n{body_text}\n</tbody></table></div>'


def _peaks(report: MemoryReport) -> str:
    rows = []
    for variant in report.variants:
        found = [report.find(variant, count) for count in report.responses]
        rows.append([variant, *("-" if p is None else format_bytes(p.peak.total_bytes) for p in found)])
    return _table(("variant", *map(case_label, report.responses)), rows)


def _breakdown(profiles: Sequence[MemoryProfile]) -> str:
    names = in_order({name for profile in profiles for name in profile.peak.bytes_by_category})
    rows = [[name, *(_cell(p.peak.bytes_by_category.get(name, 0)) for p in profiles)] for name in names]
    rows.append(["peak", *(format_bytes(p.peak.total_bytes) for p in profiles)])
    return _table(("category", *(profile.name for profile in profiles)), rows, last_is_total=True)


def _cell(num_bytes: int) -> str:
    return format_bytes(num_bytes) if num_bytes else ""


def _profile(profile: MemoryProfile, index: int, *, is_open: bool) -> str:
    """One case: its timeline, its counts, and the peak of each region."""
    peak = profile.peak
    label = f"Memory over a step, {profile.name}"
    figure = _figure([lambda ax: plot_timeline(ax, profile.timeline)], (9, 3.4), f"t{index}", label)
    regions = [(name, format_bytes(held.total_bytes)) for name, held in profile.peak_by_region.items()]
    facts = [(name.replace("num_", "").replace("_", " "), f"{value:,}") for name, value in profile.facts.items()]
    measured = [
        ("peak by the tracker", f"{profile.tracked_bytes:,} bytes"),
        ("peak by the allocator", f"{profile.allocated_bytes:,} bytes"),
    ]
    if profile.reserved_bytes is not None:
        measured.append(("reserved on the device", f"{profile.reserved_bytes:,} bytes"))
    if profile.allocator_snapshot is not None:
        measured.append(("allocator's snapshot", profile.allocator_snapshot))
    return (
        f"<details{' open' if is_open else ''}>"
        f"<summary>{escape(profile.name)}: {format_bytes(peak.total_bytes)}, in {escape(peak.region or '-')}</summary>"
        f'{figure}{_prefix(profile)}<div class="columns">'
        f"<div><h3>Peak while a region ran</h3>{_table(('region', 'peak'), regions)}</div>"
        f"<div><h3>The step</h3>{_table(('count', ''), facts)}{_table(('measured', ''), measured)}</div>"
        "</div></details>"
    )


def _prefix(profile: MemoryProfile) -> str:
    size = profile.prefix_size
    if not (profile.prefix_bytes or size.num_tokens):
        return '<p class="note">No keys and values are kept for later passes.</p>'
    return (
        f'<p class="note">Prefix keys and values: {profile.prefix_bytes:,} bytes held; by the formula '
        f"{escape(str(size))} = {size.num_bytes:,} bytes.</p>"
    )


def _settings(settings: Mapping[str, object]) -> str:
    return _table(("setting", ""), [(name, str(value)) for name, value in settings.items()])
