"""What the renderers, the tests and make share: the settings, the list of chapters, the filter.

    python site/notebooks.py install-cells   # rewrite what derives from settings.ini: each
                                             # notebook's first code cell, CITATION.cff, URLs
"""
import configparser
import json
import re
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
OPTION = re.compile(r"^#\|[ \t]*([\w-]+):[ \t]*(.*)\n?", re.M)  # of a cell, for Quarto: name and YAML
OPTIONS = re.compile(r"(#\|.*\n?)*")
INSTALL_CELL = """\
#| hide
# Colab: install the book's package if it is missing.
import importlib.util

if importlib.util.find_spec("llm_book") is None:
    %pip install -q "git+https://github.com/{user}/{repo}@{branch}"
"""
CITATION = """\
# Written by `make export` from settings.ini.
cff-version: 1.2.0
message: If you use the book or its package, please cite it as below.
type: software
title: "{title}"
abstract: "{description}. Code: Apache-2.0; prose and figures: CC BY 4.0."
authors:
  - name: "{author}"
version: {version}
license: Apache-2.0
repository-code: "https://github.com/{user}/{repo}"
url: "https://{user}.github.io/{repo}/"
"""
URLS = {"Homepage": "https://{user}.github.io/{repo}/",  # in pyproject.toml
        "Repository": "https://github.com/{user}/{repo}",
        "Issues": "https://github.com/{user}/{repo}/issues",
        "Changelog": "https://github.com/{user}/{repo}/blob/{branch}/CHANGELOG.md"}


def settings() -> dict:
    """settings.ini: user, repo, branch, title, version, …"""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser.defaults())


def parts() -> list[tuple[str | None, list[Path]]]:
    """The book's parts in reading order, as _quarto.yml lists them: (title or None, notebooks)."""
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    found = []
    for entry in config["website"]["sidebar"]["contents"]:
        if isinstance(entry, str):
            found.append((None, [ROOT / entry]))
        else:
            found.append((entry["section"], [ROOT / path for path in entry["contents"]]))
    return found


def chapters() -> list[Path]:
    """Every notebook of the book, in reading order."""
    return [path for _, paths in parts() for path in paths]


def colab_url(notebook: str) -> str:
    """Where Colab opens nbs/NOTEBOOK."""
    where = "{user}/{repo}/blob/{branch}".format(**settings())
    return f"https://colab.research.google.com/github/{where}/nbs/{notebook}"


def filter_notebook(notebook):
    """The notebook as a page shows it: nbdev's directives obeyed and gone, live widgets dropped."""
    # nbdev takes its settings from the folder it runs in, and its import costs a second.
    from execnb.nbio import dict2nb, nb2str
    from nbdev import processors
    from nbdev.process import NBProcessor

    show = [processors.populate_language, processors.hide_line, processors.strip_ansi,
            processors.rm_export, processors.hide_, fold_]
    nb = dict2nb(dict(notebook))
    NBProcessor(nb=nb, procs=show, rm_directives=True).process()
    page = nbformat.reads(nb2str(nb), as_version=4)
    for cell in page.cells:
        if cell.cell_type == "code":
            found, code = options(cell.source)
            cell.source = "".join(f"#| {name}: {quoted(text)}\n" for name, text in found.items()) + code
    drop_widgets(page)
    return page


def fold_(cell) -> None:
    """nbdev's processor for our directive `#| fold`, which it keeps out of the modules."""
    cell.source = f"#| code-fold: true\n{cell.source}"


def options(source: str) -> tuple[dict[str, str], str]:
    """What stands before a filtered cell's code, as `{name: YAML}`, and the code."""
    found = OPTIONS.match(source)[0]
    return dict(OPTION.findall(found)), source[len(found):]


def quoted(text: str) -> str:
    """A text that YAML reads as one text: `a line: up` would be two, and stops Quarto."""
    try:
        read = yaml.safe_load(f"value: {text}")["value"]
    except yaml.YAMLError:
        read = ""
    if isinstance(read, str) and read != text and not (read and text[0] in "\"'"):
        return json.dumps(text, ensure_ascii=False)
    return text


def drop_widgets(notebook) -> None:
    """Take live widgets out of the outputs: without a kernel they are dead."""
    live = "application/vnd.jupyter.widget-view+json"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if live not in out.get("data", {})]


def write_install_cells() -> None:
    """Point the first code cell of every notebook at the repository that settings.ini names."""
    source = INSTALL_CELL.format(**settings()).rstrip()
    for path in chapters():
        notebook = nbformat.read(path, as_version=4)
        first = next(cell for cell in notebook.cells if "importlib.util" in cell.source)
        if first.source != source:
            first.source = source
            nbformat.write(notebook, path)


def write_links() -> None:
    """Write CITATION.cff, and the project's URLs in pyproject.toml, where they have changed."""
    book, project, citation = settings(), ROOT / "pyproject.toml", ROOT / "CITATION.cff"
    text = project.read_text(encoding="utf-8")
    for name, url in URLS.items():
        text = re.sub(rf'^{name} = ".*"$', f'{name} = "{url.format(**book)}"', text, flags=re.M)
    for path, content in ((project, text), (citation, CITATION.format(**book))):
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["install-cells"]:
        sys.exit(__doc__)
    write_install_cells()
    write_links()
