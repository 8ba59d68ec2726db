"""Quarto's notebook filter: a notebook comes in on stdin, the page's notebook goes out on stdout."""
import contextlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import nbformat
from notebooks import filter_notebook

notebook = nbformat.reads(sys.stdin.read(), as_version=4)
with contextlib.redirect_stdout(io.StringIO()):  # nothing but the notebook may reach stdout
    page = filter_notebook(notebook)
sys.stdout.write(nbformat.writes(page))
