"""A plan as a picture for notebooks: boundaries in a row, an arc for each estimate from where it is taken.

SVG made by hand: notebooks show it without matplotlib, which the library does not need. ``hzo plan --draw`` draws more.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Arc = tuple[int, int, int]
"""Target, source, repeats."""

_WIDTH, _MARGIN = 720, 24
_RISE = 0.62  # half-ellipses of nested trees do not cross if they rise with this power of their length


def tree_as_html(arcs: Sequence[Arc], labels: Sequence[str], text: str) -> str:
    """The picture, with the plan's own text folded under it: a first line of what it is, a second of what it costs."""
    head, cost, *_ = [*text.splitlines(), "", ""]
    return (
        f'<div class="hzo-plan"><div><b>{escape(head)}</b></div>{tree_as_svg(arcs, labels)}'
        f"<details><summary>{escape(cost)}</summary><pre>{escape(text)}</pre></details></div>"
    )


def tree_as_svg(arcs: Sequence[Arc], labels: Sequence[str]) -> str:
    """The tree alone. Colors are those of the page: it is right on a dark one, too."""
    last = max((source for _, source, _ in arcs), default=1)
    highest = max(((source - target) ** _RISE for target, source, _ in arcs), default=1.0)
    height = round(min(170.0, 26 + 26 * highest))
    base = height + 6
    x = [_MARGIN + (_WIDTH - 2 * _MARGIN) * k / last for k in range(last + 1)]
    words = [*labels, *map(str, range(len(labels), last + 1))]
    paths = []
    for target, source, repeats in arcs:
        rise = (height - 4) * (source - target) ** _RISE / highest
        said = f"{words[target]} from {words[source]}" + (f", {repeats:,} times" if repeats > 1 else "")
        paths.append(
            f'<path d="M {x[target]:.1f} {base} A {(x[source] - x[target]) / 2:.1f} {rise:.1f} 0 0 1 {x[source]:.1f} '
            f'{base}" fill="none" stroke="#2f8ac4" stroke-width="{1.4 + min(3.0, (repeats - 1).bit_length() / 2):.1f}">'
            f"<title>{escape(said)}</title></path>"
        )
    known = {target for target, _, _ in arcs} | {last}
    dots = [
        f'<circle cx="{x[k]:.1f}" cy="{base}" r="{4 if last < 60 else 2}" stroke="currentColor" '
        f'fill="{"currentColor" if k in known else "none"}"><title>{escape(words[k])}</title></circle>'
        for k in range(last + 1)
    ]
    ends = [
        f'<text x="{x[k]:.1f}" y="{base + 20}" text-anchor="{anchor}" font-size="12" fill="currentColor">{word}</text>'
        for k, anchor, word in ((0, "start", "input"), (last, "end", "loss"))
    ]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {base + 28}" style="max-width:{_WIDTH}px;width:100%" role="img" '
        f'aria-label="tree of the plan">{"".join((*paths, *dots, *ends))}</svg>'
    )
