"""What LSH merged, as HTML: a page of its own (`render`), and a section of the report (`section`)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from megatron_lsh.observing.report.charts import NUM_COLOURS, short
from megatron_lsh.observing.report.merges import NO_CLUSTER, Cluster, Excerpt, LayerMerges
from megatron_lsh.observing.report.style import document

_SIGNS = {" ": "·", "\t": "→", "\n": "↵", "\r": "←"}
MERGES_STYLE = """
.merged { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.75 ui-monospace, "DejaVu Sans Mono", monospace; }
.merged span, code span.is { border-radius: 3px; padding: 1px 0; }
.merged .sent { text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: 3px; }
.m0 { background: #2f6fde55; } .m1 { background: #d9622b55; } .m2 { background: #1b9e7755; } .m3 { background: #b04a9c55; }
.m4 { background: #c9970066; } .m5 { background: #56a8dc66; } .m6 { background: #8a5a4455; } .m7 { background: #5b647255; }
code { font: 12.5px ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre; }
code .is { background: #c9970055; color: var(--ink); }
code.around { color: var(--soft); }
.tokens code { background: var(--page); border-radius: 4px; padding: 1px 5px; margin: 0 1px; }
.tokens { white-space: normal; line-height: 1.9; min-width: 22em; }
.heat { text-align: center; }
h3 { font-size: 14px; margin: 14px 0 6px; }
"""


def render(layers: Sequence[LayerMerges], title: str, notes: Sequence[str]) -> str:
    """The whole page as one HTML text that needs no other file, script or network."""
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    body = f"<h1>{escape(title)}</h1>{said}<section><h2>Layers</h2>{_overview(layers)}</section>"
    body += "".join(map(_layer, layers))
    return document(title, body, MERGES_STYLE)


def section(found: Sequence[tuple[str, Sequence[LayerMerges]]]) -> str:
    """For the report: by run its layers, and the three largest clusters of each. Nothing where there is nothing."""
    parts = []
    for name, layers in found:
        rows = "".join(_cluster_row(cluster, str(layer.layer)) for layer in layers for cluster in layer.largest[:3])
        table = f"<table><tr>{_head('layer', 'expert', 'rows', 'error', 'sent for them', 'tokens')}</tr>{rows}</table>"
        parts.append(
            f"<h3>{escape(name)}</h3>{_overview(layers)}<h3>Largest clusters</h3><div class=panel>{table}</div>"
        )
    if not parts:
        return ""
    return (
        f"<style>{MERGES_STYLE}</style><section><h2>What LSH merges</h2><p>Rows of a text that travelled as one, "
        f"as see_merges found them; its own page shows more.</p>{''.join(parts)}</section>"
    )


def _head(*names: str, text: int = 2) -> str:
    """Headings; the last `text` of them are of columns of words."""
    classes = [""] * (len(names) - text) + [' class="text"'] * text
    return "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(names, classes, strict=True))


def _overview(layers: Sequence[LayerMerges]) -> str:
    rows = []
    for layer in layers:
        largest = layer.largest[0].size if layer.largest else 1
        sent = f"{layer.sent:,} ({layer.sent / max(layer.rows, 1):.1%})"
        cells = (f"{layer.rows:,}", sent, f"{layer.alone:,}", str(largest), f"{layer.missed:.3f}", f"{layer.error:.4f}")
        rows.append(f"<tr><td>{layer.layer}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    names = ("layer", "rows", "sent", "for one row alone", "largest cluster", "residual energy", "restored error")
    return f'<div class="panel"><table><tr>{_head(*names, text=0)}</tr>{"".join(rows)}</table></div>'


def _layer(layer: LayerMerges) -> str:
    means = "" if layer.sends_rows else " (means were sent: the row nearest to each is shown)"
    clusters = "".join(
        _cluster_row(cluster, f'<span class="chip c{number % NUM_COLOURS}"></span>')
        for number, cluster in enumerate(layer.largest)
    )
    worst = "".join(
        f"<tr><td>{row.expert}</td><td>{row.size}</td><td>{short(row.error)}</td>{_cell(row.row)}{_cell(row.sent)}</tr>"
        for row in layer.worst
    )
    names = ("", "expert", "rows", "error", "sent for them" + means, "tokens of the cluster, and how often")
    worst_names = ("expert", "rows in its cluster", "error", "token", "what was sent for it")
    parts = [
        ("The beginning of the text", "Coloured: in one of the clusters below. Underlined: sent.", _text(layer)),
        ("Largest clusters", "", f"<table><tr>{_head(*names)}</tr>{clusters}</table>"),
        (
            "Tokens with the largest restored error",
            "Error: |y - y'|² / |y'|² of the restored output y and the exact one y' of one expert.",
            f"<table><tr>{_head(*worst_names)}</tr>{worst}</table>",
        ),
        ("Experts by kind of token", "Which share of the rows of each kind goes to which expert.", _kinds(layer)),
    ]
    body = "".join(
        f"<h3>{escape(name)}</h3>{f'<p>{escape(text)}</p>' if text else ''}<div class=panel>{content}</div>"
        for name, text, content in parts
    )
    return f"<section><h2>Layer {layer.layer}</h2>{body}</section>"


def _cluster_row(cluster: Cluster, first: str) -> str:
    tokens = " ".join(f"<code>{_visible(text)}</code> {count}" for text, count in cluster.tokens)
    rest = cluster.size - sum(count for _, count in cluster.tokens)
    tokens += f" and {rest} more" if rest else ""
    return (
        f"<tr><td>{first}</td><td>{cluster.expert}</td><td>{cluster.size}</td><td>{short(cluster.error)}</td>"
        f'{_cell(cluster.sent)}<td class="text tokens">{tokens}</td></tr>'
    )


def _cell(excerpt: Excerpt) -> str:
    before, token, after = (_visible(text) for text in (excerpt.before, excerpt.token, excerpt.after))
    return f'<td class="text"><code class="around">{before}<span class="is">{token}</span>{after}</code></td>'


def _text(layer: LayerMerges) -> str:
    spans = []
    for piece in layer.text:
        kinds = [] if piece.cluster == NO_CLUSTER else [f"m{piece.cluster % NUM_COLOURS}"]
        kinds += ["sent"] if piece.sent else []
        # A line that ends is seen to end, and ends.
        text = _visible(piece.text, spaces=False).replace("↵", "↵\n")
        spans.append(f'<span class="{" ".join(kinds)}" title="error {short(piece.error)}">{text}</span>')
    return f'<div class="merged">{"".join(spans)}</div>'


def _kinds(layer: LayerMerges) -> str:
    experts = max((len(shares) for _, _, shares in layer.kinds), default=0)
    head = _head("kind", "rows", *map(str, range(experts)), text=0)
    lines = []
    for kind, rows, shares in layer.kinds:
        cells = "".join(
            f'<td class="heat" style="background: rgb(47 111 222 / {min(share, 1.0):.2f})">{share:.0%}</td>'
            for share in shares
        )
        lines.append(f"<tr><td>{escape(kind)}</td><td>{rows:,}</td>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _visible(text: str, spaces: bool = True) -> str:
    """Escaped, with signs for what is not seen: spaces, line ends, and characters that are no writing."""
    shown = text if spaces else text.replace(" ", "\N{NO-BREAK SPACE}")
    signs = (_SIGNS.get(c, c if c.isprintable() or c == "\N{NO-BREAK SPACE}" else f"\\u{ord(c):04x}") for c in shown)
    return escape("".join(signs)) or "∅"
