"""Sphinx configuration."""

from gpntk import __version__

project = "gpntk"
author = "The gpntk developers"
copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "tutorials/*.py.md5", "tutorials/*.ipynb", "tutorials/*.py", "tutorials/*.json"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
default_role = "literal"
myst_enable_extensions = ["dollarmath"]
html_theme = "alabaster"
html_theme_options = {"description": "Trained networks as Gaussian processes", "page_width": "1040px"}
# The README links to files of the repository that are no pages here.
suppress_warnings = ["config.cache", "ref.python", "myst.xref_missing"]
sphinx_gallery_conf = {
    "examples_dirs": "../tutorials",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"/\d\d_",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
}
