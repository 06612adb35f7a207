"""Follow every link inside a built site: pages, figures and anchors. Links to other hosts are not followed.

python scripts/check_links.py site
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse


class Page(HTMLParser):
    """What a page links to, and which anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and name in ("id", "name"):
                self.anchors.add(value)


def broken(site: Path) -> tuple[list[str], int]:
    """Links that lead nowhere, with the page that they are on; and how many were followed."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    found, followed = [], 0
    for path, page in pages.items():
        for link in page.links:
            address, anchor = urldefrag(link)
            if urlparse(address).scheme or address.startswith(("//", "/")):  # the page 404.html has links from the root
                continue
            followed += 1
            target = (path.parent / unquote(address)).resolve() if address else path
            target = target / "index.html" if target.is_dir() else target
            missing_anchor = anchor and target in pages and unquote(anchor) not in pages[target].anchors
            if not target.exists() or (missing_anchor and not anchor.startswith("__")):
                found.append(f"{path.relative_to(site.resolve())}: {link}")
    return found, followed


if __name__ == "__main__":
    errors, number = broken(Path(sys.argv[1]))
    print("\n".join(errors))
    print(f"{number} links followed, {len(errors)} broken")
    sys.exit(bool(errors) or not number)
