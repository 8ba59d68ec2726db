"""The house rules that a machine can check: export, clean notebooks, order of imports, links."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT
from notebooks import INSTALL_CELL, chapters, filter_notebook, parts, settings

BIN = Path(sys.executable).parent
NOTEBOOKS = chapters()
NUMBERED = [path for path in NOTEBOOKS if path.stem[0].isdigit()]
STANDARD_OR_DECLARED = {"torch", "numpy", "einops", "matplotlib", "matplotlib_inline", "ipywidgets",
                        "jaxtyping", "safetensors", "regex", "tqdm"} | sys.stdlib_module_names


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code_cells(path: Path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def copy_of_the_house(tmp_path_factory):
    """The working tree without anything built, to run nbdev in."""
    copy = tmp_path_factory.mktemp("house") / "llm_book"
    ignore = shutil.ignore_patterns(".venv", ".colab", ".git", "_*", "__pycache__", "dist", "build")
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: [
        name for name in ignore(folder, names) if name not in ("__init__.py", "_modidx.py")])
    return copy


def test_export_gives_exactly_the_committed_package(copy_of_the_house):
    package = copy_of_the_house / "llm_book"
    committed = {path.name: path.read_text() for path in (ROOT / "llm_book").glob("*.py")}
    for path in package.glob("*.py"):
        if path.name != "__init__.py":
            path.unlink()
    subprocess.run([BIN / "nbdev_export"], cwd=copy_of_the_house, check=True, capture_output=True)
    exported = {path.name: path.read_text() for path in package.glob("*.py")}
    assert exported.keys() == committed.keys()
    for name in exported:
        assert exported[name] == committed[name], f"{name}: run `make export`"


def test_notebooks_are_clean(copy_of_the_house):
    subprocess.run([BIN / "nbdev_clean"], cwd=copy_of_the_house, check=True, capture_output=True)
    for path in NOTEBOOKS:
        cleaned = (copy_of_the_house / "nbs" / path.name).read_text()
        assert cleaned == path.read_text(), f"{path.name}: run `make run NB=nbs/{path.name}`"


@each(NOTEBOOKS)
def test_notebook_form(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    title, install = notebook.cells[:2]
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", title.source), "title cell: '# Title' and '> subtitle'"
    assert install.source == INSTALL_CELL.format(**settings()).rstrip(), "run `make export`"
    for cell in code_cells(path):
        assert not any(out.output_type == "error" for out in cell.outputs)
        tree = ast.parse(re.sub(r"^(\s*)%.*$", r"\1pass", cell.source, flags=re.M))
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body}
        assert len(kinds) < 2 or cell.source == install.source, f"imports stand in their own cell:\n{cell.source}"


@each(NUMBERED)
def test_chapter_has_its_parts(path):
    notebook = read(path)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for part in ("**The question.**", "**What you will have built.**", "**Read first.**",
                 "## What we learnt", "## References"):
        assert part in prose, part
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    number, noun = path.stem.split("_", 1)
    assert sum(source.startswith(f"#| default_exp {noun}") for source in code) == 1
    exercises = re.findall(rf"### Exercise {number}\.(\d)", prose)
    checks = re.findall(rf'^check\("{number}\.(\d)"', "\n".join(code), re.M)
    assert exercises == checks == (["1"] if number == "00" else ["1", "2", "3"])
    assert prose.count("<details>") == prose.count("</details>") == len(exercises)


@each(NOTEBOOKS)
def test_figures_have_alt_text(path):
    for cell in code_cells(path):
        if any("image/svg+xml" in out.get("data", {}) or "image/png" in out.get("data", {})
               for out in cell.outputs):
            assert re.search(r"^#\| fig-alt: .{30,}", cell.source, re.M), cell.source


@each(NOTEBOOKS)
def test_prose_is_portable(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for forbidden in (":::", "@fig-", "@sec-", "```{", "<img", "!["):
                assert forbidden not in cell.source, f"{forbidden} in {cell.source[:80]!r}"
            for target in re.findall(r"\]\(([^)#]+\.ipynb)", cell.source):
                assert ROOT / "nbs" / target in NOTEBOOKS, f"broken link to {target}"


def test_imports_run_backward():
    order = {path.stem.split("_", 1)[1]: int(path.stem[:2]) for path in NUMBERED}
    for module, number in order.items():
        tree = ast.parse((ROOT / "llm_book" / f"{module}.py").read_text())
        for node in ast.walk(tree):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else ["llm_book." * node.level + node.module]
                     if isinstance(node, ast.ImportFrom) else [])
            for name in names:
                top, *rest = name.split(".")
                if top == "llm_book":
                    assert rest and order[rest[0]] < number, f"{module} imports {name}"
                else:
                    assert top in STANDARD_OR_DECLARED, f"{module} imports {name}, not declared"


def test_lines_of_the_package_fit():
    for path in NUMBERED:
        for cell in code_cells(path):
            if cell.source.startswith("#| exports"):
                for line in cell.source.splitlines():
                    assert len(line) <= 100, f"{path.stem}: {line}"


def test_quarto_project():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    book = settings()
    assert config["project"]["type"] == "website" and config["project"]["output-dir"] == "_site"
    assert config["website"]["title"] == book["title"]
    assert config["execute"] == {"enabled": False} and "html" in config["format"]
    assert (ROOT / "nbs" / config["ipynb-filters"][0]).resolve() == ROOT / "site" / "filter.py"
    assert (ROOT / config["format"]["html"]["css"]).is_file()
    command = config["project"]["post-render"].split()
    assert command[0] == "cp" and (ROOT / command[1]).is_file()


def test_quarto_lists_exactly_the_notebooks_in_order():
    assert sorted(NOTEBOOKS) == sorted((ROOT / "nbs").glob("*.ipynb"))
    assert NOTEBOOKS[0].stem == "index"
    assert NUMBERED == sorted(NUMBERED) == NOTEBOOKS[1:]
    assert all(title is None or title.startswith("Part ") for title, _ in parts())


@each(NOTEBOOKS)
def test_filter_keeps_prose_and_gives_a_valid_notebook(path):
    filtered = subprocess.run([sys.executable, ROOT / "site" / "filter.py"], cwd=path.parent,
                              input=path.read_text(), text=True, check=True, capture_output=True)
    page = nbformat.reads(filtered.stdout, as_version=4)
    nbformat.validate(page)

    def prose(notebook):
        return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]

    assert prose(page) == prose(read(path))
    sources = [cell.source for cell in page.cells if cell.cell_type == "code"]
    assert not any(re.search(r"^#\|\s*(hide|exports|default_exp)", source, re.M) for source in sources)
    assert not any("importlib.util" in source for source in sources)


def test_filter_drops_hidden_cells_directives_and_widgets():
    new = nbformat.v4
    widget = new.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})
    cells = [new.new_markdown_cell("# T"), new.new_code_cell("#| hide\nsecret"),
             new.new_code_cell("#| exports\ndef f(): pass"),
             new.new_code_cell("#| fig-alt: a line\nplot()", outputs=[widget])]
    page = filter_notebook(new.new_notebook(cells=cells))
    assert [cell.source for cell in page.cells] == [
        "# T", "def f(): pass", "#| fig-alt: a line\nplot()"]
    assert page.cells[2].outputs == []


def test_ledger_records_are_complete():
    for path in (ROOT / "llm_book" / "results").glob("*.json"):
        for key, entry in json.loads(path.read_text()).items():
            missing = {"value", "unit", "values", "sd", "seeds", "command", "hardware", "versions",
                       "commit", "date"} - entry.keys()
            assert not missing, f"{path.stem}/{key} lacks {missing}"
            python, script, *words = entry["command"].split()
            if script == "-m":
                script = words[0].replace(".", "/") + ".py"
            assert python == "python" and (ROOT / script).is_file()
            assert entry["commit"], f"{path.stem}/{key} was measured outside a checkout"
            assert str(ROOT) not in json.dumps(entry)


def test_ruff():
    subprocess.run([BIN / "ruff", "check", "--quiet", "."], cwd=ROOT, check=True)


def test_version_and_name_agree():
    import llm_book

    assert llm_book.__version__ == settings()["version"]
    assert settings()["title"] in (ROOT / "README.md").read_text()
