"""Links from pages to files of the repository outside docs/, such as ../CHANGELOG.md or ../examples, work on the site.

What a page links to becomes a part of the site: the texts of `PAGES` as pages of their own, sources as pages that show
them, folders as lists of their files, everything else (pictures, results) as copies. Links are written as they work in
the repository; here they are turned. A link to a file that does not exist stays as it is, which `--strict` refuses.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".py": "python", ".md": "markdown", ".sh": "bash", ".toml": "toml", ".yaml": "yaml", ".jsonl": "json"}
LANGUAGES |= {".csv": "text", "LICENSE": "text", "Makefile": "make", "CITATION.cff": "yaml"}
FENCE = "`" * 8
LINK = re.compile(r"(?P<before>\]\(|\]: )(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?P<after>\)|$)", re.MULTILINE)
CODE = re.compile(r"^(?P<fence> *`{3,}).*?^(?P=fence)`*$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to, and what that links to."""
    for source, uri in PAGES.items():
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=_turned((ROOT / source).read_text(), source, uri)))
    texts = [
        (file.content_string, _place(file.src_uri), file.src_uri)
        for file in files.documentation_pages()
        if file.src_uri not in PAGES.values()
    ]
    texts += [((ROOT / source).read_text(), source, uri) for source, uri in PAGES.items()]
    waiting = [target for text, source, _ in texts for target in _targets(text, source)]
    while waiting:
        source = waiting.pop()
        uri = _uri(source)
        if files.get_file_from_path(uri) is not None:
            continue
        path = ROOT / source
        if path.is_dir():
            waiting += [f"{source}/{name}" for name in _names(path)]
        files.append(_file(path, source, uri, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page that stands in docs/."""
    if page.file.generated_by is not None:
        return markdown
    return _turned(markdown, _place(page.file.src_uri), page.file.src_uri)


def _place(uri: str) -> str:
    """Where a page of docs/ stands in the repository."""
    return f"docs/{uri}"


def _uri(source: str) -> str:
    """Where a file of the repository stands on the site, as if it were a file in docs/."""
    if source in PAGES:
        return PAGES[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    path = ROOT / source
    if path.is_dir():
        return f"repository/{source}/index.md"
    return f"repository/{source}.md" if _language(path) else f"repository/{source}"


def _language(path: Path) -> str | None:
    return LANGUAGES.get(path.suffix or path.name) or LANGUAGES.get(path.name)


def _outside(text: str, source: str) -> list[tuple[re.Match[str], str]]:
    """The links of a text that lead to other files of the repository, and where."""
    code = [range(*match.span()) for match in CODE.finditer(text)]
    found = []
    for match in LINK.finditer(text):
        if ":" in match["target"] or any(match.start() in span for span in code):
            continue
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))
        if not target.startswith("..") and (ROOT / target).exists():
            found.append((match, target))
    return found


def _targets(text: str, source: str) -> list[str]:
    return [target for _, target in _outside(text, source) if not target.startswith("docs/")]


def _turned(text: str, source: str, uri: str) -> str:
    parts, end = [], 0
    for match, target in _outside(text, source):
        link = posixpath.relpath(_uri(target), posixpath.dirname(uri) or ".")
        parts += [text[end : match.start()], f"{match['before']}{link}{match['anchor'] or ''}{match['after']}"]
        end = match.end()
    return "".join([*parts, text[end:]])


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] not in "._" and path.is_file())


def _file(path: Path, source: str, uri: str, config: MkDocsConfig) -> File:
    level = InclusionLevel.NOT_IN_NAV
    if not uri.endswith(".md"):
        return File.generated(config, uri, abs_src_path=str(path), inclusion=level)
    text = _list(path, source, uri) if path.is_dir() else f"{FENCE}{_language(path)}\n{path.read_text()}\n{FENCE}\n"
    head = f"---\ntitle: {source}\nsearch:\n  exclude: true\nhide: [toc, navigation]\n---\n\n# `{source}`\n\n"
    return File.generated(config, uri, content=head + text, inclusion=level)


def _list(folder: Path, source: str, uri: str) -> str:
    lines = []
    for name in _names(folder):
        link = posixpath.relpath(_uri(f"{source}/{name}"), posixpath.dirname(uri))
        about = ast.get_docstring(ast.parse((folder / name).read_text())) if name.endswith(".py") else None
        lines.append(f"- [`{name}`]({link})" + (f": {about.splitlines()[0]}" if about else ""))
    return "\n".join(lines) + "\n"
