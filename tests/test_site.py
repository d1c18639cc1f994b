"""The site of the documentation: it is complete, it asks no other server for anything, and its messages are real."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

from fiddlehead import __version__
from tests.conftest import once

ROOT = Path(__file__).parents[1]
RESOURCES = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "object": "data"}
"""What a browser fetches by itself, and the attribute that says from where."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ELSEWHERE = re.compile(r"(?:https?:)?//")


class Page(HTMLParser):
    """What is checked of a page: headings, images, links, anchors, resources, and text that is still Markdown."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.lang = self.title = ""
        self.levels: list[int] = []
        self.without_alt: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.fetched: list[str] = []
        self.classes: set[str] = set()
        self.unread: list[str] = []
        self._open: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self._open.append(tag)
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.classes |= set(given.get("class", "").split())
        if tag in ("h1", "h2", "h3", "h4", "h5", "h6"):
            self.levels.append(int(tag[1]))
        if tag == "html":
            self.lang = given.get("lang", "")
        if tag == "img" and not given.get("alt"):
            self.without_alt.append(given.get("src", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in RESOURCES and RESOURCES[tag] in given and given.get("rel") not in ("next", "prev", "canonical"):
            self.fetched.append(given[RESOURCES[tag]])

    def handle_data(self, data: str) -> None:
        parents = self._open[-2:]
        if parents[-1:] == ["title"] and "head" in self._open and "svg" not in self._open:
            self.title += data
        if "p" in parents and "code" not in parents and re.search(r"^(- |\| |```|#+ )|\]\(\S+\)", data, re.MULTILINE):
            self.unread.append(data)
        if "td" in self._open and "\\|" in data:
            self.unread.append(data)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site."""
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip("mkdocs is not installed: pip install 'fiddlehead[docs]'")
    return once(tmp_path_factory, "site", _build)


def _build(folder: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stdout) == (0, ""), built.stdout + built.stderr


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    """The pages of the site by their paths."""
    return {str(file.relative_to(site)): Page(file) for file in sorted(site.rglob("*.html")) if file.name != "404.html"}


@pytest.mark.slow
def test_the_site_has_every_page_and_shows_the_version(site, pages):
    written = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    written |= {Path("notebooks", path.stem) for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}
    assert {str(path / "index.html") if path.name != "index" else "index.html" for path in written} <= set(pages)
    start = (site / "index.html").read_text()
    assert f"fiddlehead {__version__}" in start and re.search(rf"version {re.escape(__version__)} · commit \w+", start)


@pytest.mark.slow
def test_a_screen_reader_hears_what_the_search_is_and_no_empty_headings(site):
    for page in sorted(site.rglob("*.html")):
        text = page.read_text()
        assert "site.js" in text, page
        assert 'role="dialog" aria-label="Search">' in text and 'role="dialog">' not in text, page
        assert re.findall(r"<th\b[^>]*>\s*</th>", text) == [], page


@pytest.mark.slow
def test_a_page_needs_nothing_from_another_server(site, pages):
    fetched = {page: [each for each in found.fetched if ELSEWHERE.match(each)] for page, found in pages.items()}
    assert {page: found for page, found in fetched.items() if found} == {}
    for style in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']+", style.read_text()) == []
    # For these, the theme's script fetches its libraries.
    assert [page for page, found in pages.items() if found.classes & {"mermaid", "arithmatex", "md-source"}] == []


@pytest.mark.slow
def test_every_link_inside_the_site_leads_to_a_page_and_a_place_in_it(site, pages):
    broken = []
    for page, found in pages.items():
        for link in found.links:
            if re.match(r"[a-z]+:", link) or ELSEWHERE.match(link):
                continue
            path, anchor = urldefrag(urljoin(f"/{page}", link))
            target = unquote(path).lstrip("/")
            target = f"{target}index.html" if target.endswith("/") or not target else target
            if not (site / target).is_file() or (target in pages and unquote(anchor) not in pages[target].anchors):
                broken.append(f"{page}: {link}")
    assert broken == []


@pytest.mark.slow
def test_a_page_has_one_title_its_headings_skip_no_level_and_its_images_are_described(pages):
    for page, found in pages.items():
        assert found.levels[0] == 1 and found.levels.count(1) == 1, page
        assert all(after - before <= 1 for before, after in zip(found.levels, found.levels[1:], strict=False)), page
        assert found.without_alt == [], page
        assert found.lang == "en", page
        assert found.unread == [], page
    titles = [found.title for found in pages.values()]
    assert all(titles) and len(set(titles)) == len(titles)


@pytest.mark.slow
def test_the_search_finds_a_message_and_a_setting(site):
    found = json.loads((site / "search/search_index.json").read_text())["docs"]
    assert any("the plan does not fit: it needs" in each["text"] for each in found)
    assert any("num_query_groups" in each["title"] for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recipe", "launch", "run", "training", "models", "attention", "data"])
def test_the_page_of_a_package_has_every_name_that_it_exports(name, pages):
    package = import_module(f"fiddlehead.{name}")
    for each in package.__all__:
        homes = {package.__name__, getattr(getattr(package, each), "__module__", package.__name__)}
        assert {f"{home}.{each}" for home in homes} & pages[f"api/{name}/index.html"].anchors, each


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="there is no Chromium here")
def test_the_check_of_pages_opens_each_in_both_schemes_and_says_what_it_finds(tmp_path: Path):
    """In the place of axe-core there is a script that takes a dark background for a mistake."""
    (tmp_path / "site" / "inner").mkdir(parents=True)
    style = "<style>@media (prefers-color-scheme: dark) { body { background: #000 } }</style>"
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    (tmp_path / "site" / "index.html").write_text(f"<title>a</title>{policy}{style}<p>a")
    (tmp_path / "site" / "inner" / "b.html").write_text("<title>b</title><p>b")
    axe = tmp_path / "axe.js"
    axe.write_text("""
        window.axe = { run: async page => ({ violations:
          getComputedStyle(page.body).backgroundColor === "rgb(0, 0, 0)" && matchMedia("(hover)").matches
            ? [{ id: "dark", help: "too dark", nodes: [{ html: page.title, failureSummary: "black" }] }] : [] }) };
    """)
    command = [sys.executable, ROOT / "docs" / "check_pages.py", tmp_path / "site", "--axe", axe]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 1 and checked.stderr == "1 problems\n", checked.stderr
    assert checked.stdout.split("\n\n") == [
        "light: 2 pages\n/index.html (dark): dark: too dark\n  a\n  black",
        "dark: 2 pages\n",
    ]


WRITTEN = [*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^ *(```+).*?^ *\1$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_written_page_leads_to_a_file_and_a_heading(page: Path):
    text = re.sub(r"^ *(```+).*?^ *\1$|`[^`\n]+`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, anchor = urldefrag(link)
        target = (page.parent / path).resolve() if path else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    assert broken == []


def messages(folders: list[Path]) -> str:
    """All texts of the source, one a line: pieces between placeholders are together, joined by NUL."""
    found = []
    for file in (file for folder in folders for file in sorted(folder.rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("\0".join(str(each.value) for each in node.values if isinstance(each, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n\n".join(found)


def test_every_message_of_the_troubleshooting_page_is_one_of_the_source():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)
    assert len(quoted) > 40 and len(quoted) == len(re.findall(r"^\| (?!message)", page, re.MULTILINE))
    source = messages([ROOT / "src" / "fiddlehead", ROOT / "launch"])
    parts = {part.strip() for each in quoted for part in each.split("...") if part.strip()}
    assert sorted(part for part in parts if part not in source) == []
