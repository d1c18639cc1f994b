"""Hooks of mkdocs for the site of the documentation: the version, and what lies outside docs/, notebooks too."""

from __future__ import annotations

import contextlib
import html
import json
import posixpath
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
VERSION = re.findall(r'^__version__ = "(.+)"$', (ROOT / "src/fiddlehead/__init__.py").read_text(), re.MULTILINE)[0]

OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks/repeat.md",
    "examples/notebooks/recipes.ipynb": "notebooks/recipes.md",
    "examples/notebooks/fine_tuning.ipynb": "notebooks/fine_tuning.md",
    "examples/notebooks/attention.ipynb": "notebooks/attention.md",
    "examples/notebooks/sweep.ipynb": "notebooks/sweep.md",
}
"""Files of the repository that are part of the site, and their paths there."""

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
"""A link to a file, not an image: its text, its path and its anchor."""


def on_config(config: MkDocsConfig) -> None:
    """Shows the version of the package in the header, and so in every title; in the footer also the commit."""
    config.site_name += f" {VERSION}"
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # an archive of the source is not in git
        commit = subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
        config.copyright = f"{config.copyright} · version {VERSION} · commit {commit}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside docs/."""
    from mkdocs.structure.files import File

    for path, uri in OUTSIDE.items():
        if path.endswith(".ipynb"):
            made = File.generated(config, uri, content=as_markdown(json.loads((ROOT / path).read_text())))
        else:
            made = File.generated(config, uri, abs_src_path=str(ROOT / path))
        files.append(made)
    return files


def as_markdown(notebook: dict[str, Any]) -> str:
    """A notebook as a page: its text, its code, and the output that is saved with it."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [shown for output in cell["outputs"] if (shown := _output(output, cell["metadata"].get("alt", "")))]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any], alt: str) -> str:
    """What a cell has printed or shown, as Markdown."""
    data = output.get("data", {})
    if "text/html" in data:
        return f'<div class="output">{"".join(data["text/html"])}</div>'
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{picture}">'
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    return f"```{{ .text .output }}\n{text}\n```" if text else ""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads the links of a page that cross the border of docs/ to the same file in the site.

    A link to a file that is not in the site, such as one of the source, becomes its text and the file's path.
    """
    uri = page.file.src_uri
    here = {there: path for path, there in OUTSIDE.items()}.get(uri, f"docs/{uri}")

    def inside(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        place = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        target = OUTSIDE.get(place, place.removeprefix("docs/"))
        if place in OUTSIDE or place.startswith("docs/"):
            return f"[{text}]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{anchor})"
        return f"{text} (`{place}`)" if (ROOT / place).exists() else match[0]

    return LINK.sub(inside, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    r"""Shows `\|` in a table as `|`, also in code, as GitHub does; an empty corner of a table is not a heading."""
    html = re.sub(r"<th\b[^>]*></th>", "<td></td>", html)
    return re.sub(r"<td\b.*?</td>", lambda cell: cell[0].replace(r"\|", "|"), html, flags=re.DOTALL)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Names the dialog of the search, which the theme does not."""
    return _named(output)


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """As `on_post_page`, for the page that a server shows for a wrong address."""
    return _named(output_content)


def _named(page: str) -> str:
    return page.replace('role="dialog">', 'role="dialog" aria-label="Search">')
