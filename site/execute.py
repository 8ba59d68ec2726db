"""Execute notebooks the way a reader does: one kernel each, top to bottom, no network.

    python site/execute.py NOTEBOOK [NOTEBOOK …]             # in an empty folder; nothing is kept
    python site/execute.py --in-place NOTEBOOK [NOTEBOOK …]  # outputs go back into the notebook

After each exercise's stub the answer folded below it is run as well: the stub must fail its
check and the answer must pass. And where a cell reads the ledger, by `recall` or `plot_ladder`,
what the notebook has stored must be what the cell gives today.
"""
import argparse
import ctypes
import os
import re
import socket
import struct
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SKIP = re.compile(r"^#\|\s*(cuda|slow)\s*$", re.M)  # tst_flags of settings.ini
ANSWER = re.compile(r"<details>.*?```python\n(.*?)```.*?</details>", re.S)
CHECK = re.compile(r"^check\(.*\)$", re.M)
LEDGER = re.compile(r"\b(recall|plot_ladder)\(")
MATPLOTLIB = re.compile(r"<dc:title>(Matplotlib v[^<,]+)")


def cut_network() -> None:
    """Move this process into a network namespace that has nothing but a loopback device (Linux)."""
    new_user, new_net = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_net if os.geteuid() == 0 else new_user | new_net):
        raise OSError(ctypes.get_errno(), "no network namespace")
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        set_flags, up = 0x8914, 1  # SIOCSIFFLAGS, IFF_UP
        fcntl.ioctl(sock, set_flags, struct.pack("16sh14x", b"lo", up))


def with_answers(notebook):
    """A copy in which every exercise is first shown unsolved, then solved by its folded answer."""
    copy, stub = nbformat.from_dict(notebook), None
    cells = []
    for cell in copy.cells:
        cells.append(cell)
        if cell.cell_type == "code" and (calls := CHECK.findall(cell.source)):
            stub = calls[-1]
            cells.append(nbformat.v4.new_code_cell(
                "from llm_book import lab as _lab\n"
                "assert list(_lab.solved.values()) == [False], _lab.solved"))
        elif cell.cell_type == "markdown" and stub and (answer := ANSWER.search(cell.source)):
            cells.append(nbformat.v4.new_code_cell(
                f"{answer[1]}\n{stub}\n"
                "assert list(_lab.solved.values()) == [True]\n_lab.solved.clear()"))
            stub = None
    if stub:
        raise SystemExit(f"no folded answer follows {stub}")
    copy.cells = cells
    return copy


def shown(cell) -> tuple[str, list[str]]:
    """What a cell's outputs say: the text, printed or displayed; and the figures, as SVG."""
    text, figures = "", []
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "stream" and output.name == "stdout":
            text += output.text
        elif svg := data.get("image/svg+xml"):
            figures.append(svg)
        elif not any(kind.startswith(("image/", "application/")) for kind in data):
            text += data.get("text/html") or data.get("text/plain", "")
    return text, figures


def refuse_stale(stored, fresh) -> None:
    """Compare the cells that read the ledger: as the notebook has them, and as they ran now.

    Figures are compared if the same version of matplotlib drew both.
    """
    now = {cell.id: cell for cell in fresh.cells}
    for cell in stored.cells:
        if cell.cell_type == "code" and LEDGER.search(cell.source) and cell.id in now:
            (old, old_figures), (new, new_figures) = shown(cell), shown(now[cell.id])
            drawn_by = [set(MATPLOTLIB.findall("".join(figures)))
                        for figures in (old_figures, new_figures)]
            if old != new:
                raise SystemExit(f"cell {cell.id} shows other values than the ledger has; stored:\n"
                                 f"{old}\ntoday:\n{new}\nExecute the page in place.")
            if len(old_figures) != len(new_figures) or (
                    drawn_by[0] == drawn_by[1] and old_figures != new_figures):
                raise SystemExit(f"cell {cell.id} shows another figure than the ledger gives today:\n"
                                 f"{cell.source}\nExecute the page in place.")


def execute(path: Path, in_place: bool) -> None:
    notebook = nbformat.read(path, as_version=4)
    run = notebook if in_place else with_answers(notebook)
    skipped = [cell for cell in run.cells if cell.cell_type == "code" and SKIP.search(cell.source)]
    run.cells = [cell for cell in run.cells if cell not in skipped]
    with tempfile.TemporaryDirectory() as folder:
        # The folder is empty but for the notebook, as in Colab.
        nbformat.write(run, Path(folder) / path.name)
        client = NotebookClient(run, timeout=600, kernel_name="python3",
                                resources={"metadata": {"path": folder}})
        client.execute()
    if not in_place:
        refuse_stale(notebook, run)
    else:
        from notebooks import drop_widgets

        drop_widgets(run)  # a slider without its kernel is only an error message
        outputs = {cell.id: cell for cell in run.cells}
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = [outputs.get(cell.id, cell) for cell in notebook.cells]
        nbformat.write(notebook, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--in-place", action="store_true", help="keep the outputs")
    parser.add_argument("--network", action="store_true", help="leave the network as it is")
    args = parser.parse_args()
    os.environ.update(TQDM_DISABLE="1", PYTHONHASHSEED="0")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    if not args.network:
        try:
            cut_network()
        except (OSError, AttributeError) as error:
            print(f"the network is not cut: {error}", file=sys.stderr)
    for path in args.notebooks:
        execute(path, args.in_place)
        print(f"executed {path.name}")


if __name__ == "__main__":
    main()
