"""Tell a VerifyReport: as lines for a terminal, and as one HTML page with plots that needs nothing else."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

from mmm_export.errors import MissingPackageError
from mmm_export.exporter.comparison import Comparison
from mmm_export.exporter.verify_report import ONE_TO_SPLIT, ORACLE_TO_ORT, ORACLE_TO_TORCH, TORCH_TO_ORT, VerifyReport
from mmm_export.manifest import Manifest

HOPS = (TORCH_TO_ORT, ORACLE_TO_ORT, ORACLE_TO_TORCH, ONE_TO_SPLIT)  # in this order; others as they come
COLUMNS = ("value", "max abs", "relative", "L2", "1 - cosine", "KL", "verdict")


def table_rows(report: VerifyReport) -> list[tuple[str, ...]]:
    """One row for each kind of value of each hop, the worst layer standing for all: hop first, then COLUMNS."""
    rows: list[tuple[str, ...]] = []
    for hop in _hops(report):
        groups: dict[str, list[Comparison]] = {}
        for row in report.comparisons:
            if row.hop == hop:
                groups.setdefault(_group(row), []).append(row)
        for name, members in groups.items():
            worst = max(members, key=lambda row: (not row.passed, row.l2))
            label = name if len(members) == 1 else f"{name}, worst of {len(members)}: {worst.what}"
            rows.append((hop, label, *_cells(worst)))
    return rows


def verdict_lines(report: VerifyReport) -> list[str]:
    """What failed and why the bound is there; then the tokens; then the verdict."""
    lines = []
    for row in report.comparisons:
        for bound in row.broken:
            sign = "at least" if bound.measure == "cosine" else "at most"
            lines.append(
                f"FAILED {row.what} ({row.hop}): {bound.measure} {row.value(bound.measure):.3g}, "
                f"wanted {sign} {bound.limit:g} ({bound.reason})"
            )
    lines += list(report.notes)
    lines.append(_token_line(report))
    lines.append("verdict: " + ("PASSED" if report.passed else "FAILED"))
    return lines


def html_report(report: VerifyReport) -> str:
    """The whole report as one self-contained HTML page.

    Raises:
        MissingPackageError: matplotlib, which draws the plots, is not installed.
    """
    plots = "".join(
        f"<h2>{html.escape(title)}</h2>{svg}"
        for title, svg in (
            ("Error of each layer's output", _plot(report, "output")),
            ("Error of each layer's state", _plot(report, "state")),
        )
        if svg
    )
    manifest = report.manifest
    is_bundle = isinstance(manifest, Manifest)
    facts = {
        "bundle" if is_bundle else "engine": report.bundle,
        "compared with": report.checkpoint,
        "type": manifest.dtype,
        "scan": manifest.body if isinstance(manifest, Manifest) else f"plugin, {manifest.flavor}",
        "layers": f"{manifest.model.layers}, {len(manifest.model.attention_layers)} of them attention",
        "prompt": f"{report.prompt_tokens} tokens, {report.image_tokens} of them image",
        "tools": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
    }
    summary = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    verdict = "passed" if report.passed else "failed"
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in verdict_lines(report))
    rows = [(row.hop, row.what, *_cells(row)) for row in report.comparisons]
    return _PAGE.format(
        verdict=verdict,
        summary=summary,
        lines=lines,
        plots=plots,
        worst=_html_table(table_rows(report)),
        all_rows=_html_table(rows),
    )


def _hops(report: VerifyReport) -> list[str]:
    found = list(dict.fromkeys(row.hop for row in report.comparisons))
    return [hop for hop in HOPS if hop in found] + [hop for hop in found if hop not in HOPS]


def _group(row: Comparison) -> str:
    if row.layer is not None:
        return "layer " + row.what.split()[-1]
    return "logits of steps" if row.what.startswith("logits of") else row.what


def _cells(row: Comparison) -> tuple[str, ...]:
    kl = "" if row.kl is None else f"{row.kl:.2e}"
    verdict = "ok" if row.passed else "FAILED"
    return (
        f"{row.max_abs:.2e}",
        f"{row.relative:.2e}",
        f"{row.l2:.2e}",
        f"{1 - row.cosine:.1e}",
        kl,
        verdict if row.bounds else "",
    )


def _token_line(report: VerifyReport) -> str:
    check = report.tokens
    if check.first_difference is None:
        return f"greedy tokens: all {len(check.wanted)} equal"
    kind = "a tie within the tolerance of the logits" if check.excused else "not a tie"
    i = check.first_difference
    return f"greedy tokens: {i} equal, then {check.found[i]} instead of {check.wanted[i]} ({kind})"


def _plot(report: VerifyReport, kind: str) -> str:
    """SVG of relative L2 error against layer, a line for each hop; "" when nothing of the kind was compared."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackageError(
            "the HTML report needs matplotlib", found="not installed", hint='pip install "mmm-export[export]"'
        ) from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mmm-export"  # the same report gives the same file
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    for hop in _hops(report):
        points: dict[int, float] = {}
        for row in report.comparisons:
            if row.hop == hop and row.layer is not None and (row.what.endswith("output") == (kind == "output")):
                points[row.layer] = max(points.get(row.layer, 0.0), row.l2)
        if points:
            axes.plot(list(points), [max(v, 1e-17) for v in points.values()], marker="o", markersize=3, label=hop)
    if not axes.lines:
        pyplot.close(figure)
        return ""
    axes.set(yscale="log", xlabel="layer", ylabel="relative L2 error")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _html_table(rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in ("hop", *COLUMNS))
    body = "".join(
        f'<tr class="{"bad" if row[-1] == "FAILED" else ""}">'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mmm-export verify: {verdict}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 span {{ padding: 0 .4em; border-radius: .3em; color: #fff; }}
.passed {{ background: #19753b; }} .failed {{ background: #b3261e; }}
table {{ border-collapse: collapse; font-size: 13px; }} th, td {{ padding: .15rem .7rem; text-align: left; }}
thead th {{ border-bottom: 2px solid #999; }} tbody tr:nth-child(even) {{ background: #f5f5f5; }}
tr.bad td {{ background: #fbdad7; }} svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>Parity <span class="{verdict}">{verdict}</span></h1>
<table>{summary}</table>
<ul>{lines}</ul>
<h2>Worst of each kind</h2>{worst}
{plots}
<details><summary>All values</summary>{all_rows}</details>
</body></html>
"""
