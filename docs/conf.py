"""Sphinx configuration."""

import re

from gpntk import __version__

project = "gpntk"
author = "The gpntk developers"
copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = [
    "_build",
    "tutorials/*.py.md5",
    "tutorials/*.ipynb",
    "tutorials/*.py",
    "tutorials/*.json",
]
templates_path = ["_templates"]
autosummary_imported_members = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_use_ivar = True
default_role = "literal"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "gpntk"
html_static_path = ["_static"]
html_css_files = ["gpntk.css"]
sphinx_gallery_conf = {
    "examples_dirs": "../tutorials",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"/\d\d_",
    "ignore_pattern": r"ruff\.toml",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
}


def _escape_bars(_app, _what, _name, _object, _options, lines: list[str]) -> None:
    """|x| is an absolute value in our docstrings, a substitution in Sphinx."""
    for index, line in enumerate(lines):
        # Every second piece stands between quotes that keep bars as they are.
        pieces = re.split(r"(``.*?``|`.*?`)", line)
        if not line.lstrip().startswith((">>>", "...")):
            lines[index] = "".join(
                piece if place % 2 else piece.replace("|", r"\|")
                for place, piece in enumerate(pieces)
            )


def setup(app) -> None:
    """Register the hook."""
    app.connect("autodoc-process-docstring", _escape_bars, priority=900)
