"""A search's results as one page to look through: `page.html` with the data put in. It loads nothing from elsewhere."""

import json
from collections.abc import Sequence
from typing import Any


def page(name: str, reports: Sequence[dict[str, Any]]) -> str:
    """The page for the results of `scaling.estimate.report.report`, one for each machine."""
    from importlib.resources import files  # slow to import, and wanted by nobody else

    template = (files("scaling") / "estimate" / "page.html").read_text("utf-8")
    data = json.dumps({"name": name, "machines": list(reports)}, allow_nan=False)
    # In a script element only "<" could end it early.
    return template.replace("/*DATA*/", data.replace("<", "\\u003c"))
