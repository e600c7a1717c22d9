"""``report.html``: one file that shows what a run learned, opens anywhere and asks nothing of the network.

Curves are computed here and drawn by page.js; what was said is shown by conversations.js when a conversation is opened. Every
text goes through the template's escaping, or into the page as data that the scripts show as text, and the page's own content
security policy forbids anything but its one script and embedded pictures.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmrl.progress import clock
from mmrl.report import evaluation
from mmrl.report.charts import chart_data
from mmrl.report.evaluation import is_evaluation
from mmrl.report.files import replacing
from mmrl.report.run import load
from mmrl.report.summary import summarize
from mmrl.report.trained import trained_scores

__all__ = ["FILE", "build", "build_evaluation", "is_evaluation"]

FILE = "report.html"
_STYLES = ("page.css", "conversations.css", "pictures.css")
_SCRIPTS = ("elements.js", "page.js", "conversations.js", "pictures.js")  # one after the other, as one


def build(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from what the run has left there so far, and return its path.

    Works for unfinished runs, without evaluations, without rollouts. Raises MMRLError if ``run_dir`` is no run or not writable.
    """
    run_dir = Path(run_dir)
    run = load(run_dir)
    charts = chart_data(run.rows, trained_scores(run.config))
    data = charts | run.recorded.talks.data()
    return _write(run_dir, "page.html.jinja", data, run=run, summary=summarize(run), charts=charts)


def build_evaluation(folder: Path) -> Path:
    """Write ``folder/report.html`` of what ``mmrl evaluate CHECKPOINT CONFIG`` left there. Raises MMRLError if it is damaged."""
    measured = evaluation.load(folder)
    return _write(folder, "evaluation.html.jinja", chart_data([]) | measured.recorded.talks.data(), measured=measured)


def _write(folder: Path, template: str, data: Any, **shown: Any) -> Path:
    script = "".join(map(_part, _SCRIPTS))
    page = (
        _templates()
        .get_template(template)
        .render(
            **shown,
            data=_embeddable(data),
            style="".join(map(_part, _STYLES)),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    path = folder / FILE
    with replacing(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return path


def _part(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader(__name__, "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters.update(percent=_percent, points=_points, duration=clock, number=_number, reward=_reward)
    return templates


def _embeddable(data: Any) -> str:
    """JSON that no text in it can close the script element around."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def _points(change: float) -> str:
    """A change of a share, in percentage points, with a typographic sign."""
    return f"{'+' if change >= 0 else '−'}{abs(100 * change):.1f}"


def _reward(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
