"""Results side by side: what each of several folders holds, compared on what all of them have scored.

`results` reads folders that `lusifer evaluate --out` wrote, `sections` computes every table and bar once, `render` puts
them into a page that loads nothing, and into Markdown. Imports neither torch nor mteb.
"""

from lusifer.evaluation.report.render import render, write
from lusifer.evaluation.report.results import read

__all__ = ["read", "render", "write"]
