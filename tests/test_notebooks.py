"""Every page as a reader in Colab runs it: from an installed wheel, alone in an empty folder, offline.

The environment is a fresh one, kept in .colab/ until the dependencies change; the wheel is built
and installed anew for every run. Each exercise's stub must fail and each folded answer must pass.
"""
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from execute import refuse_stale
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebooks import chapters

COLAB = ROOT / ".colab"
EXECUTE = [sys.executable, ROOT / "site" / "execute.py"]


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


@pytest.fixture(scope="session")
def colab(tmp_path_factory, testrun_uid):
    """The Python of an environment that has the wheel and nothing of the repository."""
    COLAB.mkdir(exist_ok=True)
    python = COLAB / "venv" / "bin" / "python"
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in
                                     ("pyproject.toml", "constraints.txt"))).hexdigest()
    with FileLock(COLAB / "lock"):
        done = COLAB / "done"
        state = done.read_text().split() if done.exists() else ["", ""]
        if state[1] == testrun_uid:
            return python
        shutil.rmtree(COLAB / "dist", ignore_errors=True)
        source = tmp_path_factory.mktemp("source") / "llm_book"
        shutil.copytree(ROOT / "llm_book", source / "llm_book")
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", COLAB / "dist", source)
        (wheel,) = (COLAB / "dist").glob("*.whl")
        if state[0] != wanted:
            shutil.rmtree(COLAB / "venv", ignore_errors=True)
            run(sys.executable, "-m", "venv", COLAB / "venv")
            run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt",
                f"{wheel}[run]")
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
        done.write_text(f"{wanted} {testrun_uid}")
    return python


def clean_environment():
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_the_wheel_is_what_gets_imported(colab, tmp_path):
    where = run(colab, "-c", "import llm_book; print(llm_book.__file__)", cwd=tmp_path,
                env=clean_environment()).stdout
    assert where.startswith(str(COLAB)), where
    files = {path.name for path in Path(where.strip()).parent.iterdir()}
    assert {"py.typed", "results", "lab.py"} <= files


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_notebook_runs_away_from_the_repository(colab, path, tmp_path):
    copy = shutil.copy(path, tmp_path)
    done = run(colab, ROOT / "site" / "execute.py", copy, cwd=tmp_path, env=clean_environment())
    assert f"executed {path.name}" in done.stdout


def test_the_network_is_cut():
    """Where Linux allows it, a notebook under test cannot reach even this machine's own network."""
    code = ("import sys; sys.path.insert(0, 'site'); import execute, socket; execute.cut_network(); "
            "print(len(socket.if_nameindex()), end=' '); s = socket.socket(); "
            "print(s.connect_ex(('192.0.2.1', 80)) != 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    if "no network namespace" in done.stderr:
        pytest.skip("this machine does not allow network namespaces; notebooks ran with the network on")
    assert done.stdout.split() == ["1", "True"], done.stderr


def test_a_wrong_answer_would_be_noticed(tmp_path):
    judge = ("from llm_book.lab import check, exercise\n\n\n@exercise('98.1')\ndef judge(fn):\n"
             "    assert fn() == 4")
    for stub, answer, passes in ((3, 4, True), (4, 4, False), (3, 3, False)):
        page = new_notebook(cells=[
            new_code_cell(judge), new_code_cell(f"def f():\n    return {stub}\n\ncheck('98.1', f)"),
            new_markdown_cell("<details><summary>Answer</summary>\n\n```python\ndef f():\n"
                              f"    return {answer}\n```\n\n</details>")])
        nbformat.write(page, tmp_path / "page.ipynb")
        done = subprocess.run([*EXECUTE, tmp_path / "page.ipynb"], capture_output=True, text=True)
        assert (done.returncode == 0) == passes, done.stderr[-2000:]


def ledger_page(source, **outputs):
    """A page of one cell, with its outputs: text, or figures by a version of matplotlib."""
    made = [new_output("stream", text=outputs["text"])] if "text" in outputs else []
    for version, line in outputs.get("figures", ()):
        svg = f"<svg><dc:title>Matplotlib v{version}, https</dc:title>{line}</svg>"
        made.append(new_output("display_data", {"image/svg+xml": svg, "text/plain": "<Figure>"}))
    return new_notebook(cells=[new_code_cell(source, id="a-cell", outputs=made)])


@pytest.mark.parametrize("source, stored, fresh, noticed", [
    ('print(recall("a/b"))', dict(text="1\n"), dict(text="1\n"), None),
    ('print(recall("a/b"))', dict(text="1\n"), dict(text="2\n"), "stored:\n1\n\ntoday:\n2"),
    ('print(recall("a/b"))', {}, dict(text="2\n"), "stored:\n\ntoday:\n2"),
    ("print(time.time())", dict(text="1\n"), dict(text="2\n"), None),
    ('plot_ladder("09")', dict(figures=[("1", "x")]), dict(figures=[("1", "x")]), None),
    ('plot_ladder("09")', dict(figures=[("1", "x")]), dict(figures=[("1", "y")]), "another figure"),
    ('plot_ladder("09")', dict(figures=[("1", "x")]), dict(figures=[("2", "y")]), None),
    ('plot_ladder("09")', {}, dict(figures=[("2", "y")]), "another figure"),
])
def test_a_stale_ledger_value_would_be_noticed(source, stored, fresh, noticed):
    pages = ledger_page(source, **stored), ledger_page(source, **fresh)
    if not noticed:
        refuse_stale(*pages)
        return
    with pytest.raises(SystemExit) as error:
        refuse_stale(*pages)
    assert "cell a-cell" in str(error.value) and noticed in str(error.value)


def test_what_the_ledger_shows_is_the_same_in_every_run(tmp_path, ledger):
    """Text, table and ladder, executed in place and again; then with another ledger."""
    from llm_book.lab import record

    cells = ["from llm_book.lab import plot_ladder, recall, set_style\n\nset_style()",
             'entry = recall("ladder/gpt")\nprint(f"{entry[\'value\']:.2f}")\nplot_ladder("14")',
             '#| slow\nprint(recall("nothing"))']
    page = new_notebook(cells=[new_code_cell(source) for source in cells])
    page.cells[2].outputs = [new_output("stream", text="not compared")]
    nbformat.write(page, tmp_path / "page.ipynb")
    codes = []
    for value, flags in ((2.0, ["--in-place"]), (2.0, []), (2.001, [])):
        record("ladder/gpt", value, "bits per byte", seeds=(), command="c")
        done = subprocess.run([*EXECUTE, *flags, tmp_path / "page.ipynb"], capture_output=True, text=True)
        codes.append(done.returncode)
    stored = nbformat.read(tmp_path / "page.ipynb", as_version=4).cells[1].outputs
    assert stored[0].text == "2.00\n" and "image/svg+xml" in stored[2].data
    assert codes == [0, 0, 1], done.stderr
    assert f"cell {page.cells[1].id} shows another figure" in done.stderr  # 2.00 is what it prints still
