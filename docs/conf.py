"""Sphinx settings: ``make docs`` builds these pages, without network access."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # autodoc imports the library

project = "fisherprune_jax"
html_title = "fisherprune_jax"
html_show_copyright = False
html_theme = "furo"
extensions = [
  "myst_parser",
  "sphinx_copybutton",
  "sphinx.ext.autodoc",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
copybutton_prompt_text = r">>> |\.\.\. "  # what is copied is code, without prompts and output
copybutton_prompt_is_regexp = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the descriptions say what a tree of what is
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list: they are no objects of their own
napoleon_attr_annotations = False
napoleon_use_rtype = False
