"""Opens every page of build/site in headless Chromium: python docs/hooks/open_pages.py, or `make docs-check`.

Fails on an error in the console, a request that leaves the machine, a link or anchor that leads nowhere, a picture that
is not drawn, and a page that is wider than a phone's or a desktop's screen. Needs playwright, and Chromium.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which
from urllib.parse import unquote, urldefrag, urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

SITE = Path(__file__).resolve().parents[2] / "build" / "site"
WIDTHS = {"desktop": 1280, "phone": 390}
LOOK = """() => ({
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    pictures: [...document.images].map(i => [i.src, i.naturalWidth]),
})"""
# Lazy pictures would be drawn only once they are on the screen.
DRAW = """() => {
    [...document.images].forEach(i => i.loading = 'eager');
    return Promise.all([...document.images].map(i => i.decode().catch(() => 0)));
}"""
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder over localhost, for the time being; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


def check(browser: Browser, address: str, screenshots: Path | None) -> list[str]:
    """What is wrong, one line each."""
    problems: list[str] = []
    ids: dict[str, set[str]] = {}
    links: dict[str, list[str]] = {}
    pages = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if path.name != "404.html")
    for size, width in WIDTHS.items():
        tab = browser.new_page(viewport={"width": width, "height": 900})
        _watch(tab, problems, address)
        for name in pages:
            tab.goto(address + name, wait_until="load")
            tab.evaluate(DRAW)
            found = tab.evaluate(LOOK)
            ids[name], links[name] = set(found["ids"]), found["links"]
            problems += [f"{name}: picture {url} is not drawn" for url, drawn in found["pictures"] if not drawn]
            if (excess := tab.evaluate(OVERFLOW)) > 0:
                problems.append(f"{name}: {excess} px wider than a {size}'s {width}")
            if screenshots is not None and not name.startswith("repository/"):
                path = screenshots / size / name.replace("/", "-").replace(".html", ".png")
                tab.screenshot(path=path, full_page=False)
        tab.close()
    for name, urls in links.items():
        problems += [f"{name}: {url} leads nowhere" for url in urls if not _leads_somewhere(url, address, ids)]
    print(f"{len(pages)} pages, {sum(map(len, links.values()))} links, {sum(map(len, ids.values()))} anchors")
    return list(dict.fromkeys(problems))


def _watch(tab: Page, problems: list[str], address: str) -> None:
    """Add to the problems what the browser tells about the tab's pages."""

    def note(text: str) -> None:
        problems.append(f"{urlsplit(tab.url).path.lstrip('/')}: {text}")

    local = (address, "data:", "blob:")
    tab.on("console", lambda message: note(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: note(str(error)))
    tab.on("request", lambda request: None if request.url.startswith(local) else note(f"asks for {request.url}"))


def _leads_somewhere(url: str, address: str, ids: dict[str, set[str]]) -> bool:
    if not url.startswith(address):  # elsewhere; nothing is fetched from there
        return url.startswith(("https://", "mailto:"))
    page, anchor = urldefrag(url)
    name = unquote(page.removeprefix(address)) or "index.html"
    if name not in ids:
        return (SITE / name).is_file()
    return not anchor or unquote(anchor) in ids[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default=which("chromium") or which("chromium-browser") or which("google-chrome"))
    parser.add_argument("--screenshots", type=Path, help="folder for one picture per page and width")
    given = parser.parse_args()
    if given.chromium is None:
        sys.exit("error: no Chromium on the PATH; install it, or give its path with --chromium")
    with served(SITE) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        problems = check(browser, address, given.screenshots)
        browser.close()
    print("\n".join(problems) or "all is well")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
