"""What the site needs beyond the pages: source files that they link to, as pages, and formulas as MathML."""

import html
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
OUTSIDE = re.compile(r"(\]\()\.\./([^)#\s]+)")  # a link from docs/ to another folder of the repository
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = [file.abs_src_path for file in files.documentation_pages() if file.abs_src_path]
    linked = {path for page in pages for _, path in OUTSIDE.findall(Path(page).read_text(encoding="utf-8"))}
    for path in sorted(linked):
        source = REPOSITORY / path
        if not source.is_file():
            raise PluginError(f"a page links to ../{path}, which is no file of the repository")
        files.append(File.generated(config, _page(path), content=_as_page(source), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    if page.file.src_uri.startswith("source/"):
        return markdown
    return OUTSIDE.sub(lambda link: link[1] + _page(link[2]), markdown)


def on_page_content(content: str, **_: Any) -> str:
    def formula(found: re.Match[str]) -> str:
        return convert(html.unescape(found[3]), display="inline" if found[2] == "(" else "block")

    return FORMULA.sub(formula, content)


def _page(path: str) -> str:
    return str(PurePosixPath("source") / PurePosixPath(path).with_suffix(".md"))


def _as_page(source: Path) -> str:
    title = f"# {source.relative_to(REPOSITORY)}\n\n"
    text = source.read_text(encoding="utf-8")
    if source.suffix != ".ipynb":
        return f"{title}````{source.suffix.removeprefix('.')}\n{text}````\n"
    cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
    parts = [cell if kind == "markdown" else f"```python\n{cell}\n```" for cell, kind in cells]
    return "\n\n".join(parts).replace("](../docs/", "](../../")
