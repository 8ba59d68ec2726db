"""The files around the book: what derives from settings.ini, what tools and visitors look for."""
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from notebooks import CITATION, URLS, settings

BOOK = settings()


@pytest.fixture
def project():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_urls_are_those_of_the_repository_in_the_settings(project):
    urls = project["project"]["urls"]
    assert urls == {name: url.format(**BOOK) for name, url in URLS.items()}, "run `make export`"


def test_citation_file_says_what_the_settings_say(project):
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert text == CITATION.format(**BOOK), "run `make export`"
    cited = yaml.safe_load(text)
    assert cited["title"] == BOOK["title"] and cited["version"] == BOOK["version"]
    assert [author["name"] for author in cited["authors"]] == [
        author["name"] for author in project["project"]["authors"]] == [BOOK["author"]]
    assert cited["license"] in project["project"]["license"].split(" AND ")


def test_package_says_which_pythons_it_is_for_and_that_it_is_typed(project):
    classifiers = project["project"]["classifiers"]
    pythons = [name.rsplit(" ", 1)[1] for name in classifiers if ":: Python :: 3." in name]
    assert pythons == ["3.10", "3.11", "3.12", "3.13"]
    assert project["project"]["requires-python"] == f">={pythons[0]}"
    assert project["project"]["description"] == BOOK["description"]
    assert (ROOT / "llm_book" / "py.typed").read_bytes() == b""
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["llm_book"]


def test_readme_is_written_by_hand():
    """nbdev_readme makes README.md of the notebook named here; there is none, so it makes nothing."""
    assert BOOK["readme_nb"] != "index.ipynb" and not (ROOT / "nbs" / BOOK["readme_nb"]).exists()


@pytest.mark.slow  # the environment of `make fast` has no tools
def test_hooks_fetch_nothing_and_their_programs_are_there():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    assert hooks.keys() == {"clean", "export", "ruff"}
    for hook in hooks.values():
        assert hook["language"] == "system"
        program = hook["entry"].split()[0]
        bin = Path(sys.executable).parent
        assert (bin / Path(program).name).exists() if program.startswith(".venv/bin/") else shutil.which(program)


@pytest.mark.parametrize("name", ["page", "package", "sentence"])
def test_issue_forms_ask_for_what_is_needed(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids)
    for part in form["body"]:
        assert part["type"] in ("input", "textarea", "dropdown") and part["attributes"]["label"]
        assert part["type"] != "dropdown" or len(part["attributes"]["options"]) > 1
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_changes_are_listed_by_date_the_newest_first():
    dates = re.findall(r"^## .*?(\d{4}-\d\d-\d\d)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert dates == sorted(dates, reverse=True)


def test_what_nbdev_and_the_tests_leave_behind_is_ignored():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert {"_proc/", ".fast/", ".venv/", ".colab/", "_site/", "_build/", "nbs/_quarto.yml"} <= set(ignored)
