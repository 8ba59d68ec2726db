"""What all tests share."""
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "site"))  # notebooks.py, which the renderers use too

settings.register_profile("book", deadline=None, max_examples=60)
settings.load_profile("book")

OF_PAGES = ("test_house", "test_notebooks", "test_site")


def pytest_collection_modifyitems(items):
    """What executes, renders or reads pages is slow, and no business of another Python."""
    for item in items:
        if item.path.stem in OF_PAGES:
            item.add_marker("slow")


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """An empty ledger, so that no test writes into the real one."""
    monkeypatch.setenv("LLM_BOOK_LEDGER", str(tmp_path))
    return tmp_path
