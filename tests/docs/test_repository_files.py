"""Links from pages to files outside docs/: what they become on the site."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from markdown_pages import DOCS

PAGE = """\
[a test](../tests/oracle.py#L3), [all](../examples), [memory](memory.md#top), ![picture](../benchmarks/results/x.png)
[changes](../CHANGELOG.md), [elsewhere](https://example.org/a.py), [gone](../gone.py)

```text
[a test](../tests/oracle.py)
```
"""
TURNED = """\
[a test](repository/tests/oracle.py.md#L3), [all](repository/examples/index.md), [memory](memory.md#top), \
![picture](repository/benchmarks/results/x.png)
[changes](changelog.md), [elsewhere](https://example.org/a.py), [gone](../gone.py)

```text
[a test](../tests/oracle.py)
```
"""


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook in a repository that holds the files of the page."""
    pytest.importorskip("mkdocs", reason="needs the extra kvpref[docs]")
    monkeypatch.syspath_prepend(DOCS / "hooks")
    import repository_files

    names = ["tests/oracle.py", "examples/toy.py", "docs/memory.md", "benchmarks/results/x.png", "CHANGELOG.md"]
    for path in (tmp_path / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('"""About it.\n\nMore."""\n')
    monkeypatch.setattr(repository_files, "ROOT", tmp_path)
    return repository_files


def test_links_lead_to_pages_of_the_site_and_code_stays(hook: ModuleType) -> None:
    assert hook._turned(PAGE, "docs/page.md", "page.md") == TURNED


def test_links_of_pages_in_folders_go_up_as_far_as_they_must(hook: ModuleType) -> None:
    text = "[memory](../memory.md), [toy](../../examples/toy.py)"
    turned = "[memory](../memory.md), [toy](../repository/examples/toy.py.md)"
    assert hook._turned(text, "docs/tutorials/dpo.md", "tutorials/dpo.md") == turned


def test_pages_outside_docs_are_read_from_where_they_stand(hook: ModuleType) -> None:
    assert hook._turned("[memory](docs/memory.md)", "CHANGELOG.md", "changelog.md") == "[memory](memory.md)"


def test_folders_are_lists_with_what_each_file_says_of_itself(hook: ModuleType) -> None:
    folder = hook.ROOT / "examples"
    (folder / "rows.jsonl").write_text("{}\n")
    (folder / "__pycache__").mkdir()
    listed = hook._list(folder, "examples", "repository/examples/index.md")
    assert listed == "- [`rows.jsonl`](rows.jsonl.md)\n- [`toy.py`](toy.py.md): About it.\n"


def test_only_what_is_linked_is_taken(hook: ModuleType) -> None:
    targets = ["tests/oracle.py", "examples", "benchmarks/results/x.png", "CHANGELOG.md"]
    assert hook._targets(PAGE, "docs/page.md") == targets
