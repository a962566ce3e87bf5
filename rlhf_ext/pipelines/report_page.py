"""Parts of a self-contained HTML page: no file beside it, no request, and no text of a model that becomes markup."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.2rem; font-size: 1.25rem; }
table { border-collapse: collapse; }
th, td { padding: .35rem .8rem; text-align: left; border-bottom: 1px solid #dde3ea; }
td { overflow-wrap: break-word; vertical-align: top; } td.text { white-space: pre-wrap; min-width: 8rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { text-align: right; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.plots figure { margin: 0; } .plots img { width: 100%; }
.good { color: #0a7d38; } .bad { color: #b3261e; } .note { color: #55636f; }
.wide { overflow-x: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); gap: .6rem; }
.card { border: 1px solid #dde3ea; border-radius: .4rem; padding: .5rem .7rem; min-width: 0; }
.words { white-space: pre-wrap; overflow-wrap: anywhere; } .prompt { margin: 1.2rem 0; }
.asked { margin: 0 0 .4rem; font-weight: 600; } summary { cursor: pointer; overflow-wrap: anywhere; }
.page > details { margin-left: 1.2rem; }
"""


def image(figure: Any) -> str:
    """A matplotlib figure as a data URI: a page that is mailed or opened from disk must not look for files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def plots(figures: Sequence[tuple[str, Any]]) -> str:
    """Figures with their titles, side by side where there is room."""
    cells = "".join(
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f"<img alt='{html.escape(title)}' src='{image(figure)}'></figure>"
        for title, figure in figures
    )
    return f'<div class="plots">{cells}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int] = (0,)) -> str:
    """A table of escaped cells; columns in `text` keep their line breaks, the others are numbers, on the right."""
    kinds = ["text" if place in text else "number" for place in range(len(header))]

    def cell(place: int, value: str) -> str:
        return f"<td class={kinds[place]}>{html.escape(value)}</td>"

    head = "".join(f"<th class={kind}>{html.escape(name)}</th>" for kind, name in zip(kinds, header, strict=True))
    body = "".join("<tr>" + "".join(cell(i, value) for i, value in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def page(title: str, body: str) -> str:
    """The whole document. Its policy lets a browser load nothing and run nothing, whatever a completion says."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
</body></html>
"""
