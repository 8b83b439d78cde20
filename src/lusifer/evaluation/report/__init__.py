"""Results side by side: what each of several folders holds, compared on what all of them have scored.

`results` reads folders that `lusifer evaluate --out` wrote, `sections` computes every table and bar once, and `render`
puts them into two templates of ``lusifer/resources``: a page that loads nothing, and Markdown. Imports neither torch
nor mteb.
"""

from lusifer.evaluation.report.render import render, write
from lusifer.evaluation.report.results import read

__all__ = ["read", "render", "write"]
