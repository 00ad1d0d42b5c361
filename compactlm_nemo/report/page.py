"""Turns report.md into report.html: one file that needs no network, in the light or dark of its reader's device.

The text is that of the Markdown, so both say the same. Pictures are drawn into the page as SVG in the colours of the
page; what a picture shows is said beside it, in the text that stands for it in the Markdown.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping

import matplotlib
from markdown_it import MarkdownIt
from markdown_it.token import Token
from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e6e9ed; --soft: #9aa4af; --line: #39424c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
code { font-size: 0.9em; } a { color: inherit; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; overflow-wrap: normal;
  white-space: nowrap; }
figure { margin: 1.2rem 0; }
figure svg { display: block; height: auto; max-width: 100%; }
figcaption { color: var(--soft); font-size: 0.9rem; }
svg text { fill: currentColor; }
"""
_CSS_DPI = 96
_LEAST_SHARE = 0.65
"""Of its own size a picture has at least this; smaller its letters cannot be read."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(markdown: str, figures: Mapping[str, Figure]) -> str:
    """Return the HTML page of a report.

    Args:
        markdown: The report; HTML in it is shown as text, as names come from data.
        figures: File name that the Markdown gives -> figure.
    Raises:
        KeyError: the Markdown shows a picture that is not among the figures.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    title = next((tokens[i + 1].content for i, token in enumerate(tokens) if token.tag == "h1"), "report")

    def image(self: object, inline: list[Token], idx: int, options: object, env: object) -> str:
        token = inline[idx]
        return _figure(figures[str(token.attrs["src"])], str(token.attrs["src"]), token.content)

    parser.add_render_rule("image", image)
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _figure(figure: Figure, name: str, text: str) -> str:
    """Return a figure with the text that says what it shows, in the place of its paragraph."""
    caption = html.escape(text)
    return (
        f'</p><figure><div class="wide" role="img" aria-label="{caption}">{_svg(figure, name)}</div>'
        f"<figcaption>{caption}</figcaption></figure><p>"
    )


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG whose black and white are the page's; the same for the same figure."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")
    # On a narrow screen a wide picture is moved sideways in its frame, and stays legible.
    width = round(_LEAST_SHARE * figure.get_figwidth() * _CSS_DPI)
    return drawing.replace("<svg", f'<svg style="min-width: {width}px"', 1)
