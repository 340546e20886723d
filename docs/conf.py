"""The documentation as a site: `make docs`. Pages are the Markdown files of this folder and what `pages.py` makes."""

import sys
from pathlib import Path

from emerging_optimizers import __version__

sys.path.insert(0, str(Path(__file__).parent))  # for the extension `pages`

project = "Emerging Optimizers"
author = "The emerging-optimizers developers"
copyright = author
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "pages"]

# Links as GitHub follows them: to the headings of a page by their words.
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath", "amsmath"]
# The notebooks show the run of this build, and one that raises ends it.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds for a cell; all cells together take a minute of one core
nb_render_markdown_format = "gfm"  # tables too
suppress_warnings = ["mystnb.unknown_mime_type"]

smartquotes = False  # "skip" is a text that somebody will copy

# Docstrings: one backtick is code, and a type is said once, in the signature.
default_role = "code"
maximum_signature_line_length = 80  # a longer one has a line for each argument
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_ivar = True
html_math_renderer = "mathml"  # of `pages`: no script from elsewhere

html_theme = "pydata_sphinx_theme"
html_title = "Emerging Optimizers"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system has it
html_theme_options = {
    "navbar_align": "left",
    "navigation_with_keys": False,
    "header_links_before_dropdown": 6,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": [], "start": [], "choose": []}  # they have no neighbours to show
