"""The book: the notebooks as chapters, the API from their docments. `make book` builds it into `_docs/book`; it needs no network."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

project = 'msnlan'
author = copyright = 'The msnlan authors'
extensions = ['myst_nb', 'sphinx-mathjax-offline', 'api_pages']   # MathJax comes with the pages: they are read offline
myst_enable_extensions = ['dollarmath', 'colon_fence']
myst_heading_anchors = 3
nb_execution_mode = 'off'            # a notebook shows the outputs it keeps: `make notebooks` makes them
nb_remove_code_outputs = False
exclude_patterns = ['_book', '**.ipynb_checkpoints', 'experiments/Snakefile']
html_theme = 'furo'
html_title = 'msnlan'
html_static_path, html_css_files = ['static'], ['book.css']
smartquotes = False                  # commands are copied from the pages
suppress_warnings = ['mystnb.unknown_mime_type', 'myst.header', 'myst.xref_missing', 'toc.not_included']
root_doc = 'contents'
