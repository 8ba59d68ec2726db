"""Sphinx's settings for the offline renderer; what they say comes from settings.ini."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import myst_nb.sphinx_ext
import search
from notebooks import settings

book = settings()
project, author, release = book["title"], book["author"], book["version"]
copyright = f"{author}. Code: Apache-2.0; prose: CC BY 4.0"
extensions = ["myst_nb", "sphinx_external_toc", "sphinx-mathjax-offline"]
external_toc_path = "_toc.yml"
nb_execution_mode = "off"
myst_nb.sphinx_ext.OUTPUT_FOLDER = "_build/jupyter_execute"  # it has no setting of its own
nb_merge_streams = True
nb_ipywidgets_js = {}  # widgets are dropped, so nothing is loaded for them
nb_mime_priority_overrides = [("html", "image/svg+xml", 15)]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["static"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_context = {"default_mode": "auto"}
html_favicon = "static/favicon.svg"
html_search_language = search.EnglishAndChinese.lang
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "repository_url": "https://github.com/{user}/{repo}".format(**book),
    "repository_branch": book["branch"],
    "path_to_docs": "nbs",
    "use_repository_button": True,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "use_download_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
}


def open_fold(translator, node):
    """Folded code as Quarto writes it, too: one name, for the eye and for a screen reader."""
    translator.body.append('<details class="code-fold">\n<summary>Show the code</summary>\n')


def setup(app):
    from myst_nb.sphinx_ import HideCodeCellNode, depart_HideCellInput
    from sphinx.search import languages

    app.add_node(HideCodeCellNode, override=True, html=(open_fold, depart_HideCellInput))
    languages[search.EnglishAndChinese.lang] = search.EnglishAndChinese
