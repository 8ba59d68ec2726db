"""Render the book with Sphinx into _site/. No notebook is executed, and nothing is fetched.

    python site/build.py
"""
import sys
from pathlib import Path

import nbformat
import yaml
from notebooks import ROOT, chapters, filter_notebook, options, parts
from sphinx.cmd.build import main as sphinx

SOURCE, DOCTREES, OUT = ROOT / "_build/source", ROOT / "_build/doctrees", ROOT / "_site"


def for_sphinx(page):
    """Quarto takes a cell's options from its first comments, myst-nb from its metadata."""
    for cell in page.cells:
        if cell.cell_type == "code":
            found, cell.source = options(cell.source)
            found = {name: yaml.safe_load(text) for name, text in found.items()}
            if found.get("echo") is False:
                cell.metadata["tags"] = ["remove-input"]
            elif found.get("code-fold") is True:
                cell.metadata["tags"] = ["hide-input"]
            if "fig-alt" in found:
                cell.metadata["mystnb"] = {"image": {"alt": str(found["fig-alt"])}}
    return page


def write(path: Path, text: str) -> None:
    """Write only what has changed, so that Sphinx renders only what has changed."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def render_page(path: Path) -> None:
    """Filter one notebook into the source folder, unless that was done since its last change."""
    page = SOURCE / path.name
    newest = max(p.stat().st_mtime for p in (path, *Path(__file__).parent.glob("*.py")))
    if not page.exists() or page.stat().st_mtime < newest:
        notebook = for_sphinx(filter_notebook(nbformat.read(path, as_version=4)))
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(nbformat.writes(notebook), encoding="utf-8")


def table_of_contents() -> dict:
    """sphinx-external-toc's form of the list in _quarto.yml."""
    groups = [{"caption": title, "chapters": [{"file": path.stem} for path in paths]}
              for title, paths in parts() if title]
    loose = [path.stem for title, paths in parts() if not title for path in paths]
    front = {"caption": "Begin here", "chapters": [{"file": name} for name in loose[1:]]}
    return {"root": loose[0], "format": "jb-book", "parts": [front, *groups]}


def main() -> int:
    for path in chapters():
        render_page(path)
    for page in SOURCE.glob("*.ipynb"):  # a chapter that is no longer in the book
        if page.name not in {path.name for path in chapters()}:
            page.unlink()
    write(SOURCE / "_toc.yml", yaml.safe_dump(table_of_contents(), sort_keys=False))
    conf = str(Path(__file__).parent)
    return sphinx(["-q", "-W", "--keep-going", "-b", "html", "-c", conf,
                   "-d", str(DOCTREES), str(SOURCE), str(OUT)])


if __name__ == "__main__":
    sys.exit(main())
