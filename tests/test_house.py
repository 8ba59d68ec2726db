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
ENGINE_ROOM = [path for path in NOTEBOOKS if re.match(r"a[\da-z]_", path.stem)]
PAGES = NUMBERED + ENGINE_ROOM
TITLES = {  # the word of the field that a reader looks for in the contents
    "00": "lab", "01": "corpus", "02": "byte-pair encoding", "03": "n-gram", "04": "cross-entropy",
    "05": "backpropagation", "06": "automatic differentiation", "07": "optimizer", "08": "batches",
    "09": "neural language model", "10": "attention", "11": "positional encoding",
    "12": "transformer block", "13": "encoder", "14": "gpt", "15": "training", "16": "gpu",
    "17": "distributed", "18": "scaling law", "19": "sampling", "20": "beam search",
    "a1": "checkpoint", "a2": "hub", "a3": "gguf", "a4": "tokenizer", "a5": "decod", "a8": "grammar", "a9": "run folder", "aa": "chat",
    "ab": "gguf"}
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


@each(PAGES)
def test_title_names_the_subject_in_the_words_of_the_field(path):
    title, word = read(path).cells[0].source.splitlines()[0], TITLES[path.stem[:2]]
    assert word in title.lower(), f"{title!r} lacks {word!r}"


@each(PAGES)
def test_page_is_no_longer_than_it_may_be(path):
    assert len(read(path).cells) <= 65


@each(PAGES)
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
    n_least, n_most = {"00": (1, 1)}.get(number, (3, 5) if number.isdigit() else (0, 5))
    assert exercises == checks == [str(i + 1) for i in range(len(exercises))]
    assert n_least <= len(exercises) <= n_most
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


MODULES = {path.stem.split("_", 1)[1]: path.stem[:2] for path in PAGES
           if (ROOT / "llm_book" / f"{path.stem.split('_', 1)[1]}.py").exists()}
TREES = {name: ast.parse((ROOT / "llm_book" / f"{name}.py").read_text()) for name in MODULES}


def imported(node) -> list[str]:
    """Full names of the modules that an import statement reads."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [".".join(filter(None, ["llm_book" * bool(node.level), node.module]))]
    return []


def modules_read_by(tree, at_module_level: bool) -> set[str]:
    """Modules of the book that a module imports."""
    nodes = tree.body if at_module_level else ast.walk(tree)
    return {name.split(".")[1] for node in nodes for name in imported(node)
            if name.startswith("llm_book.")}


def test_imports_are_declared():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            for name in imported(node):
                if name.split(".")[0] == "llm_book":
                    assert name.split(".")[1] in MODULES, f"{module} imports {name}"
                elif node in tree.body:
                    assert name.split(".")[0] in STANDARD_OR_DECLARED, f"{module} imports {name}"


def test_imports_run_backward_and_in_no_circle():
    """Chapters read earlier chapters; the engine room reads what comes before its first user."""
    reads = {module: modules_read_by(tree, True) for module, tree in TREES.items()}

    def all_below(module: str, above: tuple = ()) -> set[str]:
        assert module not in above, f"a circle of imports: {above}"
        return reads[module].union(*(all_below(name, (*above, module)) for name in reads[module]))

    below = {module: all_below(module) for module in MODULES}
    for module, number in MODULES.items():
        if number.isdigit():
            late = {name for name in below[module]
                    if MODULES[name].isdigit() and MODULES[name] >= number}
            assert not late, f"{module} needs {late}, which come later"


def test_doors_inside_functions_are_the_three_that_are_allowed():
    doors = {(module, name) for module, tree in TREES.items()
             for name in modules_read_by(tree, False) - modules_read_by(tree, True)}
    assert doors <= {("gpt", "hub"), ("gpt", "decoder")}, doors


def test_no_private_name_crosses_a_module():
    files = [*(ROOT / "llm_book").glob("[!_]*.py"), *(ROOT / "benchmarks").glob("*.py"),
             *(ROOT / "tests").glob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and imported(node)[0].startswith("llm_book"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{path.name} imports {private}"


def code_lines(path: Path) -> dict[int, str]:
    """Lines of a module that are neither empty nor comment nor docstring."""
    text = path.read_text()
    docstrings = [node for node in ast.walk(ast.parse(text))
                  if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    skip = {line for node in docstrings for line in range(node.lineno, node.end_lineno + 1)}
    return {number: line for number, line in enumerate(text.splitlines(), 1)
            if number not in skip and line.strip() and not line.strip().startswith("#")}


def test_modules_are_short():
    for module in MODULES:
        n_lines = len((ROOT / "llm_book" / f"{module}.py").read_text().splitlines())
        assert n_lines <= 350, f"{module} has {n_lines} lines"


def test_modules_hold_no_directives():
    """nbdev copies Quarto's options into a module: `#| code-fold: true`, where a page says `#| fold`."""
    for path in (ROOT / "llm_book").glob("*.py"):
        assert not re.search(r"^#\|", path.read_text(), re.M), path.name
    for path in NOTEBOOKS:
        assert not any("code-fold" in cell.source for cell in code_cells(path)), f"{path.name}: #| fold"


def test_functions_are_short():
    """A screen holds 25 lines; the package may have five functions that need more."""
    long = {}
    for module, tree in TREES.items():
        lines = code_lines(ROOT / "llm_book" / f"{module}.py")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                n_lines = sum(node.lineno <= number <= node.end_lineno for number in lines)
                if n_lines > 25:
                    long[f"{module}.{node.name}"] = n_lines
    assert len(long) <= 5, long


@pytest.mark.parametrize("module", MODULES)
def test_guards_are_a_small_part_of_a_module(module):
    """Of the code lines of a module at most a tenth are `if …: raise` or `require(…)`."""
    lines = code_lines(ROOT / "llm_book" / f"{module}.py")
    guards = set()
    for node in ast.walk(TREES[module]):
        only_raises = (isinstance(node, ast.If) and not node.orelse
                       and all(isinstance(inner, ast.Raise) for inner in node.body))
        asks = (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
                and isinstance(node.value.func, ast.Name) and node.value.func.id == "require")
        if only_raises or asks:
            guards |= set(range(node.lineno, node.end_lineno + 1)) & lines.keys()
    most = 0.15 if module in ("lab", "data", "checkpoint", "runs", "hub") else 0.1
    assert len(guards) <= most * len(lines), f"{len(guards)} of {len(lines)} lines are guards"


def test_lines_of_the_package_fit():
    for path in PAGES:
        for cell in code_cells(path):
            if cell.source.startswith("#| export"):
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
    assert NUMBERED == sorted(NUMBERED) and ENGINE_ROOM == sorted(ENGINE_ROOM)
    assert NOTEBOOKS[1:] == NUMBERED + ENGINE_ROOM
    assert all(title is None or title.startswith("Part ") or title == "The engine room"
               for title, _ in parts())


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


@each(PAGES)
def test_readme_lists_the_page(path):
    title = read(path).cells[0].source.splitlines()[0].removeprefix("# ")
    line = f"[{path.stem.split('_')[0]} {title}](nbs/{path.name})"
    assert line in (ROOT / "README.md").read_text(encoding="utf-8")
