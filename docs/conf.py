"""Sphinx configuration: MyST Markdown, the furo theme, and the docstrings of the installed package."""

import fastserve

project = "fastserve"
author = "the fastserve developers"
project_copyright = author
version = release = fastserve.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fastserve {release}"

myst_heading_anchors = 3
autodoc_member_order = "bysource"
