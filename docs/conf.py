"""The documentation as a site: these pages, and a reference made from the docstrings. ``make docs`` builds it."""

from __future__ import annotations

import outlast

project = "outlast"
version = release = outlast.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["*.py"]
html_theme = "furo"
html_title = f"outlast {version}"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False
default_role = "literal"
