"""The documentation site: ``make docs`` builds it, warnings are errors."""

from __future__ import annotations

import os
import sys
import typing
from pathlib import Path

# Building the documentation needs no accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extensions")]

# Signatures show an array once, as ``Float[Array, 'cells genes']``, not for JAX and for numpy.
typing.GENERATING_DOCUMENTATION = ""  # type: ignore[attr-defined]
import jaxtyping  # noqa: E402

import cellplm_jax.batch  # noqa: E402

cellplm_jax.batch.Array = jaxtyping.Array

project = "cellplm-jax"
author = "the cellplm-jax authors"
version = release = cellplm_jax.__version__
language = "en"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",  # Markdown pages and notebooks
    "sphinx_copybutton",
    "command_help",
    "message_list",
    "package_map",
    "repository_links",
]
exclude_patterns = ["_build", "**/README.md"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

# -- Markdown and notebooks -----------------------------------------------------------------------
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
# Notebooks show their committed outputs.
nb_execution_mode = "off"
nb_merge_streams = True
highlight_language = "default"

# -- Python ---------------------------------------------------------------------------------------
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"show-inheritance": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Fields of dataclasses are listed once, in the docstring of the class.
napoleon_use_ivar = True
# "[cells, genes], one row per cell: expected counts" is a sentence, not a type reference.
napoleon_use_rtype = False
napoleon_custom_sections = [("Writes", "notes_style"), ("Sets the following fields", "notes_style")]

# Every reference to a name of this package must resolve; references to other sites cannot without a network.
nitpicky = True
# Private names and type variables have no pages.
nitpick_ignore_regex = [
    (r"py:(class|obj|exc|data)", r"(?!cellplm_jax\b).*"),
    (r"py:.*", r"cellplm_jax\..*(\._\w+|Type)"),
    # Internal types in annotations.
    (
        r"py:class",
        r"cellplm_jax\.(data\.(anndata_files|device_arrays|features|matrices)|display|storage)\..*",
    ),
    (
        r"py:class",
        r"cellplm_jax\.tasks\.(denoise_pool|estimator\w*|reading|recipe|\w+_fit)\.(Pool|Reading|Recipe|\w+Fit|SavedEstimator)",
    ),
]

# -- Links ----------------------------------------------------------------------------------------
# `make docs-links` follows the links to other sites; `make docs` checks those within the site, anchors included.
linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]
linkcheck_ignore = [r"http://(localhost|127\.0\.0\.1).*"]

# -- Pages ----------------------------------------------------------------------------------------
html_theme = "furo"
html_title = f"cellplm-jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False  # see the licence
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0b6e99",
        "color-brand-content": "#0b6e99",
    },
    "dark_css_variables": {
        "color-brand-primary": "#6cc4ea",
        "color-brand-content": "#6cc4ea",
    },
}
copybutton_prompt_text = "$ "
