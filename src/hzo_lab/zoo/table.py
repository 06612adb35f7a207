"""The results as a table of families, and as counts of verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from hzo_lab.zoo.trial import NOT_BUILT, RIGHT, VERDICTS, Record

_HEADINGS = ("family", "verdict", "error", "fwd eq.", "queries", "1st s", "2nd s", "backprop s", "ratio", "reason")


def _row(record: Record) -> tuple[str, ...]:
    first, second, backprop = (record.get(f"{k}_seconds") for k in ("first", "second", "backprop"))
    share = record.get("share_by_queries")
    return (
        f"{record['library']}:{record['family']}",
        record["verdict"],
        _number(record.get("error"), "{:.1e}"),
        _number(record.get("forward_equivalents"), "{:.1f}"),
        "" if share is None else f"{100 * share:.0f} %",
        _number(first, "{:.3f}"),
        _number(second, "{:.3f}"),
        _number(backprop, "{:.3f}"),
        "" if second is None or not backprop else f"{second / backprop:.1f}",
        record.get("reason", "")[:100],
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def table(records: Sequence[Record], markdown: bool = False) -> str:
    """One line a family, the worst verdicts first within a library."""
    order = {verdict: k for k, verdict in enumerate(VERDICTS)}
    ranked = sorted(records, key=lambda r: (r["library"], -order[r["verdict"]], r["family"]))
    rows = [_HEADINGS, *(_row(r) for r in ranked)]
    if markdown:
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([lines[0], "|---" * len(_HEADINGS) + "|", *lines[1:]])
    widths = [max(len(row[k]) for row in rows) for k in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def counts(records: Iterable[Record]) -> str:
    """One line a library: how many families, and how many of each verdict; those that are not built are not tried."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        found.setdefault(record["library"], Counter())[record["verdict"]] += 1
    found["all"] = sum(found.values(), Counter())
    lines = []
    for library, verdicts in found.items():
        tried = sum(n for verdict, n in verdicts.items() if verdict != NOT_BUILT)
        parts = ", ".join(f"{verdicts[v]} {v}" for v in VERDICTS if verdicts[v])
        lines.append(f"{library}: {tried} tried: {parts}")
    return "\n".join(lines)


def page(records: Sequence[Record]) -> str:
    """A page of documentation: counts by library, then every family that is not right, or was not built, and why."""
    libraries = dict.fromkeys(r["library"] for r in records)
    rows = [_counted(name, [r for r in records if r["library"] == name]) for name in libraries]
    rows.append(_counted("all", records))
    lines = [
        "# Networks of other libraries",
        "",
        "<!-- written by: hzo zoo --page docs/zoo.md -->",
        "",
        "`hzo zoo` makes model families of other libraries tiny, with random weights, runs each as its users call it,",
        "and sets hzo's gradient of every parameter beside backpropagation's. Right is a relative error of at most",
        "1e-6 in float64, 1e-4 where the library computes in float32 inside, for the first gradient and the second,",
        "and buffers as backpropagation leaves them. All are of the last sweep of record, which",
        "`results/zoo/families.jsonl` holds.",
        "",
        "| library | tried | right | share | worst error | most forward equivalents | not right | not built |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "Forward equivalents are what the gradient measures, over one forward pass: of networks this small, with a",
        "batch of two, they are many. Not built are families whose library lacks a dependency here, whose",
        "configuration does not shrink, or whose own backpropagation fails.",
        "",
        "## Not right",
        "",
        *(_reasons(r for r in records if r["verdict"] not in (RIGHT, NOT_BUILT)) or ["None."]),
        "",
        "## Not built",
        "",
        *(_reasons(r for r in records if r["verdict"] == NOT_BUILT) or ["None."]),
    ]
    return "\n".join(lines) + "\n"


def _counted(name: str, records: Sequence[Record]) -> tuple[str, ...]:
    found = Counter(r["verdict"] for r in records)
    tried, right = len(records) - found[NOT_BUILT], [r for r in records if r["verdict"] == RIGHT]
    others = ", ".join(f"{found[v]} {v}" for v in VERDICTS if found[v] and v not in (RIGHT, NOT_BUILT))
    worst = max((r["error"] for r in right), default=None)
    most = max((r["forward_equivalents"] for r in right if r.get("forward_equivalents") is not None), default=None)
    share = f"{100 * len(right) / tried:.1f} %" if tried else ""
    cells = _number(worst, "{:.0e}"), _number(most, "{:.0f}"), others or "0", str(found[NOT_BUILT])
    return (name, str(tried), str(len(right)), share, *cells)


def _reasons(records: Iterable[Record]) -> list[str]:
    ranked = sorted(records, key=lambda r: (r["library"], r["family"]))
    return [f"- `{r['library']}:{r['family']}`, {r['verdict']}: {_plain(r['reason'])}" for r in ranked]


def _plain(reason: str) -> str:
    """A reason as code, cut, so that nothing in it is taken for Markdown."""
    text = reason.replace("`", "'")
    return f"`{text[:160]}{'…' if len(text) > 160 else ''}`"


def calls(records: Iterable[Record]) -> str:
    """ATen calls on values that carry a gradient: how many families use each, and the library and name of three."""
    used: dict[str, list[str]] = {}
    for record in records:
        for call in record.get("calls", ()):
            used.setdefault(call, []).append(f"{record['library']}:{record['family']}")
    ranked = sorted(used.items(), key=lambda item: (-len(item[1]), item[0]))
    return "\n".join(f"{len(names):5d}  {call:60s}  {' '.join(names[:3])}" for call, names in ranked)
