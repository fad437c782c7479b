"""Prints, writes and draws what an output folder's finished runs say."""

from reports import figures
from reports.comparison import Comparison
from reports.html import page
from reports.text import block, details, table
from runs.files import write, write_json


def report(output, asked=None):
    """Prints the comparison of a folder's finished runs, and writes comparison.json, comparison.csv, figures and
    report.html. `asked` is as for Comparison."""
    comparison = Comparison(output, asked)
    print(f"\n{block(comparison)}\n{details(comparison)}", flush=True)
    write_json(comparison.output / "comparison.json", comparison.as_dict())
    write(comparison.output / "comparison.csv", table(comparison))
    drawn = figures.draw(comparison)
    html = page(comparison, drawn).encode(errors="backslashreplace")  # paths that are not UTF-8 among the notes
    write(comparison.output / "report.html", html)
    print(
        f"Written: {comparison.output / 'comparison.json'}, comparison.csv, report.html, "
        f"{len(drawn)} figures in {comparison.output / 'figures'}"
    )
