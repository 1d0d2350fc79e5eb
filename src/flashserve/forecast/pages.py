"""What HTML reports have in common: their look, tables, and drawings as SVG text."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from flashserve.errors import InputError

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td.better { color: #06692d; font-weight: 600; }
.short { background: #f3f5f7; padding: .6rem 1rem; border-left: 4px solid #3b6ea5; }
h1, h2 { overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; }
"""

_TABLE = """<table><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td
{%- if loop.index0 in ratios and cell and cell | float(1) <= 0.95 %} class="better"{% endif -%}
>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>"""

_environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)


def render(template: str, values: Mapping[str, object]) -> str:
    """The template with the values, escaped unless they are markup."""
    return _environment.from_string(template).render(values)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], ratios: Sequence[int] = ()) -> Markup:
    """ratios: columns, by index, in which 0.95 and less is shown as better."""
    values = {"head": head, "rows": rows, "ratios": ratios}
    return Markup(render(_TABLE, values))  # noqa: S704 - escaped there


def drawn(
    draw: Callable[[Any], None], size: tuple[float, float] = (7.2, 4.0), *, as_text: bool = False
) -> Markup:
    """The SVG of what `draw` puts on a matplotlib axes; see `drawn_figure`."""
    return drawn_figure(lambda figure: draw(figure.add_subplot()), size, as_text=as_text)


def drawn_figure(
    draw: Callable[[Any], None], size: tuple[float, float] = (7.2, 4.0), *, as_text: bool = False
) -> Markup:
    """The SVG of what `draw` puts on a matplotlib figure; size in inches.

    as_text: letters stay letters, which is small and can be searched, but follows the reader's
    fonts.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing needs matplotlib: install flashserve[forecast]") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    draw(figure)
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none" if as_text else "path"}):
        figure.savefig(text, format="svg")
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])  # noqa: S704 - matplotlib escapes what it is told
