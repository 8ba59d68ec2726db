"""The rendered book, looked at with a real browser."""
import http.client
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import nbformat
import pytest
import yaml
from conftest import ROOT
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_notebook, new_output
from notebooks import chapters, colab_url, filter_notebook, options, settings
from serve import server

PAGES = [path.stem for path in chapters()]
FOLDED = [path.stem for path in chapters() if "#| fold" in path.read_text(encoding="utf-8")]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 180_000  # ms, for a machine that has much else to do; a test fails only after that
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium found; on Debian: apt-get install chromium")


@pytest.fixture(scope="session")
def site(testrun_uid):
    """_site/, rendered from scratch by the first worker; Sphinx treats every warning as an error."""
    build, done = ROOT / "_build", ROOT / "_build" / "testrun"
    build.mkdir(exist_ok=True)
    with FileLock(ROOT / "_build" / "lock"):
        if not done.exists() or done.read_text() != testrun_uid:
            for folder in (build / "source", build / "doctrees", ROOT / "_site"):
                shutil.rmtree(folder, ignore_errors=True)
            run = subprocess.run([sys.executable, "site/build.py"], cwd=ROOT, capture_output=True,
                                 text=True)
            assert run.returncode == 0 and not run.stderr.strip(), run.stdout + run.stderr
            done.write_text(testrun_uid)
    return ROOT / "_site"


def test_builds_without_warnings_and_again_without_work(site):
    before = {path: path.stat().st_mtime_ns for path in site.glob("*.html")}
    assert {path.stem for path in before} >= set(PAGES)
    subprocess.run([sys.executable, "site/build.py"], cwd=ROOT, check=True)
    again = {path for path in site.glob("[0-9i]*.html") if path.stat().st_mtime_ns != before[path]}
    assert not again, "a second build renders pages that have not changed"


@pytest.fixture(scope="session")
def address(site):
    with server(site, 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox needs another user than root and a system that allows it; the pages are our own.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False,
                                              timeout=PATIENCE)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """Open a page; at the end, no console error and no request to another host may be left."""
    opened, complaints = [], []

    def open_page(name, width=1400, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        opened.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith((address, "data:", "blob:"))
                or complaints.append(request.url))
        page.on("response", lambda response: response.ok or response.status == 304
                or complaints.append(f"{response.status} {response.url}"))
        page.goto(f"{address}/{name}", wait_until="load")  # a slow machine is idle before that
        page.wait_for_load_state("networkidle")
        page.wait_for_function("""() => document.fonts.status === "loaded" && (!window.MathJax ||
            document.querySelectorAll(".math:not(:has(mjx-container))").length === 0)""")
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return page

    yield open_page
    for context in opened:
        context.close()
    assert complaints == []


@needs_browser
@pytest.mark.parametrize("name", PAGES)
def test_page(visit, name):
    page = visit(f"{name}.html")
    assert page.locator("article h1").count() == 1
    assert page.locator(".math").count() == page.locator(".math mjx-container").count()
    assert page.locator("mjx-merror").count() == 0
    for image in page.locator("article img").all():
        assert len(image.get_attribute("alt") or "") >= 30
        assert image.evaluate("image => image.naturalWidth") > 0
    links = page.locator("a[href*='colab.research.google.com']").all()
    assert {link.get_attribute("href") for link in links} == {colab_url(f"{name}.ipynb")}
    github = "https://github.com/{user}/{repo}".format(**settings())
    assert page.locator(f"a[href='{github}']").count() >= 1
    for anchor in page.locator("article a[href]").all():
        target = anchor.get_attribute("href")
        assert not target.endswith(".ipynb"), target


@needs_browser
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(visit, name, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(f"{name}.html", scheme=scheme)
    found = Axe().run(page, options={"preload": False}).response["violations"]
    serious = [f"{v['id']}: {v['nodes'][0]['html'][:160]}" for v in found
               if v["impact"] in ("serious", "critical")]
    assert serious == []


@needs_browser
@pytest.mark.parametrize("name", PAGES)
def test_nothing_overflows_on_a_phone(visit, name):
    page = visit(f"{name}.html", width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = page.evaluate("""[...document.querySelectorAll('article *')].filter(element => {
        if (element.closest('pre, table, mjx-container, .math, svg')) return false;
        const box = element.getBoundingClientRect();
        return box.width > 0 && box.right > innerWidth + 1;
    }).map(element => element.outerHTML.slice(0, 120))""")
    assert wide == []


@needs_browser
@pytest.mark.parametrize("word, page_name", [("perplexity", "04_loss"), ("tokenizer", "02_tokens"),
                                             ("红书", "02_tokens"), ("花园", "01_text")])
def test_search(visit, word, page_name):
    page = visit(f"search.html?q={word}")
    page.wait_for_function("document.querySelector('#search-results').innerText.includes('Search finished')")
    found = [link.get_attribute("href") for link in page.locator("#search-results li a").all()]
    assert any(f"{page_name}.html" in link for link in found), found


@needs_browser
def test_search_finds_nothing_where_there_is_nothing(visit):
    page = visit("search.html?q=书安")  # both characters occur, never side by side
    page.wait_for_function("document.querySelector('#search-results').innerText.includes('did not match')")
    assert page.locator("#search-results li a").count() == 0


@needs_browser
def test_next_and_previous_walk_the_whole_book(visit):
    page, walked = visit("index.html"), ["index"]
    while (link := page.locator("a.right-next")).count():
        target = link.evaluate("link => link.href")
        link.click()
        page.wait_for_url(target)
        walked.append(page.url.rsplit("/", 1)[1].removesuffix(".html"))
    assert walked == PAGES
    for expected in reversed(PAGES[:-1]):
        page.locator("a.left-prev").click()
        page.wait_for_url(f"**/{expected}.html")


@needs_browser
def test_table_of_contents_lists_the_whole_book(visit):
    page = visit("index.html")
    links = page.locator(".bd-sidebar-primary nav a.reference.internal").all()
    targets = [link.get_attribute("href").removesuffix(".html") for link in links]
    assert [target if target != "#" else "index" for target in targets] == PAGES


def open_menu(page, button):
    """Open a menu of the header by its button, and wait until all of it is there."""
    button, tooltip = page.locator(f"{button}:visible"), page.locator(".tooltip.show")
    menu = button.locator("xpath=following-sibling::ul")
    button.hover()
    assert not menu.is_visible()
    button.click()
    menu.wait_for(state="visible")
    assert all(tip.evaluate("tip => getComputedStyle(tip).pointerEvents") == "none" for tip in tooltip.all())
    return menu


@needs_browser
def test_dark_mode_toggles_and_turns_figures_dark(visit):
    page = visit("04_loss.html", scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    figure = "getComputedStyle(document.querySelector('.cell_output img')).filter"
    light = page.evaluate(background)
    assert page.evaluate(figure) == "none"
    open_menu(page, "button.theme-switch-button").locator("button[data-mode=dark]").click()
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    page.wait_for_function(f"light => {background} !== light", arg=light)
    page.wait_for_function(f"{figure}.includes('invert')")


WIDTHS = [390, 800, 1400]  # a phone, a tablet, a desktop


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("button", ["button.theme-switch-button", ".dropdown-launch-buttons > button"])
def test_menus_of_the_header_open_and_escape_closes_them(visit, button, width):
    page = visit("04_loss.html", width)
    menu = open_menu(page, button)
    for entry in menu.locator("li > *").all():
        entry.click(trial=True)  # nothing lies over it
    page.keyboard.press("Escape")
    menu.wait_for(state="hidden")


@needs_browser
@pytest.mark.parametrize("width", WIDTHS[:2])
@pytest.mark.parametrize("menu, entry", [("primary", "02_tokens.html"), ("secondary", "#temperature")])
def test_contents_open_over_a_narrow_page_and_lead_where_they_say(visit, menu, entry, width):
    page = visit("04_loss.html", width)
    button, dialog = page.locator(f".{menu}-toggle:visible"), page.locator(f"#pst-{menu}-sidebar-modal")
    link = dialog.locator(f"a[href='{entry}']")
    assert not dialog.is_visible()
    for _ in range(2):  # closed, it can be opened again
        button.click()
        dialog.wait_for(state="visible")
        link.click(trial=True)
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
    button.click()
    link.click()
    page.wait_for_url(f"**/*{entry}")
    dialog.wait_for(state="hidden")


@needs_browser
def test_contents_beside_a_wide_page_can_be_put_away(visit):
    page = visit("04_loss.html", WIDTHS[2])
    assert page.locator("#pst-secondary-sidebar").is_visible()  # so it needs no button
    assert not page.locator(".secondary-toggle").last.is_visible()
    contents, button = page.locator("#pst-primary-sidebar"), page.locator(".primary-toggle:visible")
    for state in ("hidden", "visible"):
        button.click()
        contents.wait_for(state=state)


@needs_browser
def test_answers_are_folded(visit):
    page = visit("02_tokens.html")
    answers = page.locator("details:not(.code-fold)").all()
    source = nbformat.read(ROOT / "nbs" / "02_tokens.ipynb", as_version=4)
    assert len(answers) == sum("<details>" in cell.source for cell in source.cells) >= 3
    assert not any(answer.get_attribute("open") for answer in answers)
    answers[0].locator("summary").click()
    answers[0].locator("pre").wait_for(state="visible")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("how", ["mouse", "keyboard"])
def test_folded_code_is_closed_and_opens(visit, scheme, how):
    """Its output is there all the time, and nothing above the code moves when it opens."""
    from axe_playwright_python.sync_playwright import Axe

    page = visit(f"{FOLDED[0]}.html", scheme=scheme)
    for cell in page.locator(".cell:has(> details.code-fold)").all():
        assert not cell.locator("pre").first.is_visible()
        for output in cell.locator("> .cell_output > *").all():
            assert output.is_visible()
    fold = page.locator("details.code-fold").first
    summary, code = fold.locator("summary"), fold.locator("pre").first
    assert summary.inner_text() == "Show the code"
    summary.scroll_into_view_if_needed()
    before = summary.bounding_box()
    if how == "mouse":
        summary.click()
    else:
        summary.focus()
        page.keyboard.press("Enter")
    code.wait_for(state="visible")
    after, start = summary.bounding_box(), code.bounding_box()["y"]
    assert after == before and start >= before["y"] + before["height"]
    found = Axe().run(page, context="details.code-fold[open]", options={"preload": False}).response
    assert [violation["id"] for violation in found["violations"]] == []
    summary.press("Enter")
    code.wait_for(state="hidden")


def test_a_cells_options_reach_sphinx_and_no_reader():
    """Folded, hidden, plumbing, not to be evaluated by nbdev: what is left of each on the page."""
    from build import for_sphinx

    out = [new_output("stream", text="out")]
    sources = ["#| export\nplumbing = 1", "#| exports\nshown = 1",
               "#| exports\n#| code-fold: true\nfolded = 1", "#| eval: false\nstub = 1",
               "#| fold\n#| fig-alt: a line: up, #1\nplot()", "#| echo: false\nprint()",
               "#| hide\nsecret = 1"]
    page = for_sphinx(filter_notebook(new_notebook(cells=[
        new_code_cell(source, outputs=out) for source in sources])))
    assert [(cell.source, cell.metadata.get("tags")) for cell in page.cells] == [
        ("shown = 1", None), ("folded = 1", ["hide-input"]), ("stub = 1", None),
        ("plot()", ["hide-input"]), ("print()", ["remove-input"])]
    assert all(cell.outputs[0].text == "out" for cell in page.cells)
    assert page.cells[3].metadata["mystnb"] == {"image": {"alt": "a line: up, #1"}}


def test_our_directive_for_folded_code_stays_out_of_the_modules():
    """A page folds a cell with `#| fold`, and of such a cell nbdev exports the code alone."""
    from execnb.nbio import dict2nb
    from nbdev.process import NBProcessor

    page = new_notebook(cells=[new_code_cell(source) for source in (
        "#| exports\n#| fold\nx = 1", "#| fold\n#| exports\nx = 1")])
    assert [cell.source for cell in filter_notebook(page).cells] == ["#| code-fold: true\nx = 1"] * 2
    assert [cell.source for cell in NBProcessor(nb=dict2nb(dict(page))).nb.cells] == ["x = 1"] * 2


@pytest.mark.parametrize("text, yaml_of_it", [
    ("a line", "a line"), ("true", "true"), ("12", "12"), ("[a, b]", "[a, b]"), ('"a: b"', '"a: b"'),
    ("'a: b'", "'a: b'"), ("a: b", '"a: b"'), ("a #b", '"a #b"'), ('"a" and "b"', r'"\"a\" and \"b\""'),
    ("`x` is a slope", '"`x` is a slope"'), ("@ and 安", '"@ and 安"'), ("[0, 1) on", '"[0, 1) on"'),
    ("*a*", '"*a*"'), ("%a", '"%a"'), ("| b", '"| b"'), ("a\\b", "a\\b"), ("a: \\b", r'"a: \\b"'),
])
def test_options_that_yaml_would_misread_are_quoted(text, yaml_of_it):
    page = filter_notebook(new_notebook(cells=[new_code_cell(f"#| fig-alt: {text}\nplot()")]))
    assert options(page.cells[0].source)[0]["fig-alt"] == yaml_of_it
    read = yaml.safe_load(f"fig-alt: {yaml_of_it}")["fig-alt"]
    assert str(read) == text or yaml_of_it == text


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_quarto_can_read_the_options_of_every_cell(path):
    for cell in filter_notebook(nbformat.read(path, as_version=4)).cells:
        lines = [line for line in cell.source.splitlines() if line.startswith("#|")]
        if cell.cell_type == "code" and lines:
            assert cell.source.startswith("\n".join(lines)), "options stand first"
            found = yaml.safe_load("\n".join(line.removeprefix("#| ") for line in lines))
            assert isinstance(found, dict) and len(found) == len(lines)
            assert isinstance(found.get("fig-alt", ""), str)


def test_the_book_is_served_at_the_next_free_port(tmp_path):
    (tmp_path / "index.html").write_text("the book")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with server(tmp_path, port) as serving:
            assert port < serving.server_port <= port + 100
            threading.Thread(target=serving.serve_forever, daemon=True).start()
            connection = http.client.HTTPConnection("127.0.0.1", serving.server_port, timeout=60)
            connection.request("GET", "/")
            assert connection.getresponse().read() == b"the book"
            connection.close()
            serving.shutdown()
        with pytest.raises(SystemExit, match="make book PORT="):
            server(tmp_path, port, n_tries=1)


def test_the_last_line_of_make_book_is_the_address(site):
    run = subprocess.Popen([sys.executable, "site/serve.py", "8000"], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        line = run.stdout.readline()
        port = int(re.fullmatch(r"The book is at http://127\.0\.0\.1:(\d+)/ .*\n", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/index.html")
        assert connection.getresponse().status == 200
        connection.close()
        run.send_signal(signal.SIGINT)
        assert run.communicate(timeout=60) == ("\n", "") and run.returncode == 0
    finally:
        run.kill()
