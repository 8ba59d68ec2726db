"""What all tests share."""
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Several processes test at once, and start others: threads that wait for each other are no help.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "site"))  # notebooks.py, which the renderers use too

settings.register_profile("book", deadline=None, max_examples=60)
settings.load_profile("book")

# What `make fast` leaves out, besides tests that are marked themselves: all that reads, executes or
# renders pages, which is no business of another Python; and what uses a fixture that starts processes.
OF_PAGES = ("test_house", "test_notebooks", "test_site")
PROCESSES = {"test_distributed": {"two", "undisturbed"}, "test_runs": {"server"}}


def pytest_collection_modifyitems(items):
    for item in items:
        name = item.path.stem
        if name in OF_PAGES or PROCESSES.get(name, set()) & set(item.fixturenames):
            item.add_marker("slow")


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """An empty ledger, so that no test writes into the real one."""
    monkeypatch.setenv("LLM_BOOK_LEDGER", str(tmp_path))
    return tmp_path
