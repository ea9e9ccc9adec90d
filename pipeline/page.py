"""An HTML page that is complete in itself: no script, no address outside of it, legible on a phone and in the dark.

All text goes through `escape`; what is called `html` is markup already.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #5b6570; --paper: #fff; --panel: #f5f6f8; --line: #dfe3e8;
  --c0: #2563c9; --c1: #d1495b; --c2: #2f8f5b; --c3: #a3690b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --soft: #9aa5b1; --paper: #14171b; --panel: #1d2126;
  --line: #333a42; --c0: #78a9ff; --c1: #ff8695; --c2: #6fcf97; --c3: #e5b567; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.015em; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 52px 0 6px; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 8px; }
p { margin: 0 0 14px; max-width: 72ch; }
.soft, figcaption, .caption { color: var(--soft); font-size: 0.875rem; line-height: 1.4; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 14px; font-size: 0.9rem; }
a { color: var(--c0); text-decoration: none; } a:hover { text-decoration: underline; }
code { font: 0.86em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; margin: 22px 0 0; }
.tile { background: var(--panel); border-radius: 10px; padding: 12px 14px; }
.tile span { display: block; line-height: 1.3; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 22px 34px;
  align-items: start; margin: 12px 0; }
.columns > * { min-width: 0; }
@media (min-width: 960px) { .columns.uneven { grid-template-columns: minmax(0, 1.9fr) minmax(0, 1fr); } }
figure { margin: 0; max-width: 540px; } figure h3 { margin: 0 0 4px; } figcaption { margin-top: 4px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit; } svg .label { fill: var(--ink); }
svg .grid { stroke: var(--line); } svg .tick { stroke: var(--soft); } svg .diagonal { stroke: var(--soft);
  stroke-dasharray: 4 4; }
.s0 { --series: var(--c0); } .s1 { --series: var(--c1); } .s2 { --series: var(--c2); } .s3 { --series: var(--c3); }
.s4 { --series: var(--soft); }
svg polyline { fill: none; stroke: var(--series); stroke-width: 2; stroke-linejoin: round; }
svg circle, svg rect { fill: var(--series); }
svg .gap { fill: var(--c1); fill-opacity: 0.35; } svg .hit { fill: var(--c0); } svg .miss { fill: var(--c1); }
svg .frame { fill: none; stroke: var(--line); } svg .count { font-size: 10px; } svg .count.on { fill: var(--paper); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 0.85rem; color: var(--soft); padding-left: 12%; }
.legend span::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle; background: var(--series); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td.n, th.n { text-align: right; } td { overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 3px 10px;
  align-items: center; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
.bars i { display: block; height: 11px; border-radius: 3px; background: var(--c0); min-width: 1px; }
.bars u { display: block; border-radius: 3px; background: var(--panel); text-decoration: none; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); gap: 12px 10px; }
.pictures.small { grid-template-columns: repeat(6, minmax(0, 1fr)); margin-bottom: 22px; }
.pictures img, .strip img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; border-radius: 6px;
  background: var(--panel); image-rendering: pixelated; }
.pictures div, .strip div { font-size: 0.75rem; line-height: 1.3; overflow-wrap: anywhere; }
.pictures div span, .strip div span { color: var(--soft); display: block; margin-top: 3px; }
.pictures .caption { margin-top: 3px; font-size: 0.75rem; hyphens: auto; }
.pictures.small .caption { font-size: 0.66rem; }
.strip { display: grid; grid-auto-flow: column; gap: 6px; grid-auto-columns: minmax(72px, 132px);
  justify-content: start; margin-bottom: 12px; }
.strip.wrap { grid-auto-flow: row; grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)); }
.strip img { image-rendering: auto; } .strip img.raw { image-rendering: pixelated; }
img.matrix { width: 100%; max-width: 500px; aspect-ratio: 1; image-rendering: pixelated; border-radius: 6px; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--c0); font-size: 0.92rem; padding: 4px 0; }
@media (max-width: 560px) { main { padding: 20px 16px 48px; } h1 { font-size: 1.5rem; } h2 { margin-top: 40px; }
  .tiles { grid-template-columns: repeat(2, 1fr); } .pictures.small { grid-template-columns: repeat(3, 1fr); }
  .tile b { font-size: 1.2rem; } .legend { padding-left: 0; } }
@media print { details > * { display: block; } }
"""


def document(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """The page: its title, `lead` in HTML, and sections in HTML by their headings; empty ones are left out."""
    kept = {heading: body for heading, body in sections.items() if body}
    anchors = {heading: f"section-{number}" for number, heading in enumerate(kept)}
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for heading, anchor in anchors.items())
    bodies = "".join(f'<h2 id="{anchors[heading]}">{escape(heading)}</h2>{body}' for heading, body in kept.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>{lead}<nav>{links}</nav>{bodies}</main></body></html>\n"
    )


def text(words: str) -> str:
    return f"<p>{escape(words)}</p>"


def soft(words: str) -> str:
    return f'<p class="soft">{escape(words)}</p>'


def tiles(values: Mapping[str, str]) -> str:
    """Figures that matter most, by what they are."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{escape(value)}</b><span class="soft">{escape(name)}</span></div>'
            for name, value in values.items()
        )
        + "</div>"
    )


def columns(*html: str, uneven: bool = False) -> str:
    """Side by side where there is room; of an uneven pair the first takes most of it."""
    return f'<div class="columns{" uneven" if uneven else ""}">{"".join(html)}</div>'


def figure(title: str, html: str, caption: str = "") -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{html}{below}</figure>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], numbers: bool = True) -> str:
    """A table, whose columns but the first are set to the right if they hold `numbers`; an empty header is left out."""

    def cells(tag: str, values: Sequence[Any]) -> str:
        styles = ["", *[' class="n"' if numbers else ""] * (len(values) - 1)]
        parts = (f"<{tag}{style}>{escape(str(v))}</{tag}>" for style, v in zip(styles, values, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    head = cells("th", header) if any(header) else ""
    return f'<div class="scroll"><table>{head}{"".join(cells("td", row) for row in rows)}</table></div>'


def bars(shares: Sequence[tuple[str, float]]) -> str:
    """Named shares in [0, 1]."""
    rows = "".join(
        f'<span>{escape(name)}</span><u><i style="width:{100 * share:.1f}%"></i></u><span>{100 * share:.1f}%</span>'
        for name, share in shares
    )
    return f'<div class="bars">{rows}</div>'


def pictures(entries: Iterable[tuple[str, str, str]], small: bool = False) -> str:
    """Pictures: address, text and softer text of each."""
    cells = "".join(
        f'<div><img src="{source}" alt="{escape(words, quote=True)}" loading="lazy">'
        f'<div class="caption"><b>{escape(words)}</b> {escape(below)}</div></div>'
        for source, words, below in entries
    )
    return f'<div class="pictures{" small" if small else ""}">{cells}</div>'


def strip(entries: Iterable[tuple[str, str, bool]], wrap: bool = False) -> str:
    """Pictures in one row, or in several if they may wrap: address, text, and whether the pixels stay visible."""
    cells = "".join(
        f'<div><img class="{"raw" if raw else ""}" src="{source}" alt="{escape(words, quote=True)}">'
        f"<span>{escape(words)}</span></div>"
        for source, words, raw in entries
    )
    return f'<div class="scroll"><div class="strip{" wrap" if wrap else ""}">{cells}</div></div>'


def details(summary: str, html: str) -> str:
    """Shown when asked for."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"
