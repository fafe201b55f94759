"""Tell an Analysis: as rows of a table, and as one HTML page with a plot that needs nothing else."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

from mmm_export.calibration.sensitivity import Analysis, Cost
from mmm_export.errors import MissingPackageError

COLUMNS = ("linear map, quantized alone", "layer", "layer error", "KL mean", "KL max", "bytes", "instead of")
SHOWN = 12  # rows of the table on a terminal; JSON and HTML have all


def table_rows(costs: Sequence[Cost]) -> list[tuple[str, ...]]:
    return [
        (
            cost.name,
            str(cost.layer) if cost.layer >= 0 else "",
            f"{cost.layer_error:.2e}" if cost.layer >= 0 else "",
            f"{cost.kl_mean:.2e}",
            f"{cost.kl_max:.2e}",
            f"{cost.bytes:,}",
            f"{cost.whole_bytes:,}",
        )
        for cost in costs
    ]


def html_report(analysis: Analysis) -> str:
    """The whole analysis as one page. Raises MissingPackageError: matplotlib is not installed."""
    rows = "".join(_row(row) for row in table_rows([analysis.together, *analysis.costs]))
    header = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    advice = ""
    if analysis.recommendation is not None:
        found = analysis.recommendation
        names = "".join(f"<li>{html.escape(name)}</li>" for name in found.skip) or "<li>none</li>"
        advice = (
            f"<h2>Recommended exceptions</h2><ul>{names}</ul><p>KL {found.measured.kl_mean:.2e} measured, "
            f"{found.predicted_kl:.2e} predicted; {found.bytes:,} bytes of weights.</p>"
        )
    facts = f"{analysis.format}, {analysis.samples} prompts, {analysis.positions} next-token distributions"
    return _PAGE.format(
        bundle=html.escape(analysis.bundle), facts=facts, plot=_plot(analysis), advice=advice, header=header, rows=rows
    )


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _plot(analysis: Analysis) -> str:
    """KL of each linear map by layer, one line a role, as SVG text."""
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "the report needs matplotlib", found="not installed", hint='pip install "mmm-export[export]"'
        ) from error
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for role in dict.fromkeys(cost.role for cost in sorted(analysis.costs, key=lambda cost: cost.layer)):
        members = sorted((cost for cost in analysis.costs if cost.role == role), key=lambda cost: cost.layer)
        axes.plot([c.layer for c in members], [c.kl_mean for c in members], marker="o", label=role)
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("KL mean, nats")
    axes.legend()
    axes.grid(alpha=0.3)
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})  # type: ignore[no-untyped-call]
    text = stream.getvalue()
    return text[text.index("<svg") :]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sensitivity of {bundle}</title>
<style>body{{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}table{{border-collapse:collapse}}
td,th{{border-bottom:1px solid #ccc;padding:.2em .7em;text-align:left}}svg{{max-width:100%;height:auto}}</style></head><body>
<h1>Sensitivity of {bundle}</h1><p>{facts}</p><h2>Cost of each linear map alone</h2>{plot}{advice}
<h2>All figures</h2><table><tr>{header}</tr>{rows}</table></body></html>
"""
