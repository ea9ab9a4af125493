"""One file to look through: page.html with the style, the scripts and the data put in. It loads nothing from elsewhere.

The data are what the run folders hold, and the names of these folders; no path, no time of day of the reader's machine.
"""

import base64
import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from scaling.report.charts import Grids, Source, marks
from scaling.report.comparison import comparison
from scaling.report.sections import single
from scaling.run_folder import strict
from scaling.summarize import RunData


def page(run: RunData, report: dict[str, Any]) -> str:
    """The page of one run. `report`: its figures."""
    return _page([run], lambda grids, sources: single(grids, sources[0], report))


def compare(runs: Sequence[RunData], reports: Sequence[dict[str, Any]]) -> str:
    """The page of several runs."""
    return _page(runs, lambda grids, sources: comparison(grids, sources, reports))


def _page(runs: Sequence[RunData], build: Any) -> str:
    names = unique_names(runs)
    sources = [Source(run, number, names[number], len(runs)) for number, run in enumerate(runs)]
    grids = Grids()
    content = build(grids, sources)
    thinned = [source for source in sources if source.thinned]
    data = {
        **content,
        "runs": names,
        "clock": "time" if all(source.began is not None for source in sources) else "training time",
        "thinned": [f"{source.name}: {len(source.records):,} logged steps" for source in thinned],
        "marks": [mark for source in sources for mark in marks(source)],
        "grids": grids.values,
    }
    return assemble(str(content["title"]), data)


def assemble(title: str, data: dict[str, Any]) -> str:
    """The template with everything put in. Its policy lets the browser run this script and style, and load nothing."""
    from importlib.resources import files  # slow to import, and wanted by nobody else

    folder = files("scaling") / "report"
    template, style, *scripts = (
        (folder / name).read_text("utf-8") for name in ("page.html", "page.css", "chart.js", "page.js")
    )
    script = "\n".join(scripts)
    parts = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": _json(data).replace("<", "\\u003c"),  # in a script element only "<" could end it early
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _json(data: dict[str, Any]) -> str:
    try:
        return json.dumps(data, allow_nan=False, separators=(",", ":"))
    except ValueError:  # NaN or infinity in a file that is not this project's; what is charted has none
        return json.dumps(strict(data), allow_nan=False, separators=(",", ":"))


def _hash(text: str) -> str:
    """What a Content-Security-Policy calls an inline script or style by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def unique_names(runs: Sequence[RunData]) -> list[str]:
    """What to call each of the runs: its folder's name, with a number where others have the same."""
    names = [run.folder.resolve().name or "run" for run in runs]
    seen: Counter[str] = Counter()
    found: list[str] = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if names.count(name) > 1 else name)
    return found
