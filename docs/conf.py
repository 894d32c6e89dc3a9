"""Sphinx configuration: MyST Markdown, the furo theme, and the docstrings of the installed package."""

import subprocess
import sys
import typing
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import fastserve

# The package does without typing, whose names are those of object there: signatures are to show what the sources say.
for module in [module for name, module in sys.modules.items() if name.startswith("fastserve")]:
    for name in ("Any", "Final", "Self"):
        if vars(module).get(name) is object:
            setattr(module, name, getattr(typing, name))

project = "fastserve"
author = "the fastserve developers"
project_copyright = author
version = release = fastserve.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fastserve {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]

# Every reference has to lead somewhere, but those to the stdlib: its inventory would be fetched with every build.
nitpicky = True
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(asyncio|collections|concurrent|contextlib|http|ipaddress|logging|os|socket|socketserver|ssl|threading)(\..*)?",
    ),
    ("py:class", r"fastserve\.(.*\.)?_\w+(\.\w+)?"),  # type variables, bases, and what only a type checker sees
]

myst_heading_anchors = 3
autodoc_member_order = "bysource"
# Longer signatures have a line for each parameter.
python_maximum_signature_line_length = 90


def add_unreleased(app: Sphinx, page: str, content: list[str]) -> None:
    """Put what has not been released yet on the page of the changelog, from the directory ``changes``."""
    if page == "changelog":
        command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", release, "--date", "unreleased"]
        result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        if result.returncode:
            raise ExtensionError(result.stderr)
        content[0] = content[0].replace("<!-- unreleased -->", result.stdout)


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_unreleased)
    app.connect("env-get-outdated", lambda *state: ["changelog"])  # its file alone does not tell
