"""report.html: the comparison as one file to hand on, which fetches nothing. Its template is report.html.jinja."""

import base64
import hashlib
from pathlib import Path

import jinja2

from reports import accuracy, calibration, costs, fidelity, omitted
from reports.accuracy import decimals, points
from reports.text import COLUMNS, claim, differently_trained, largest_class, method, run_values
from runs.settings import UNFAIR_SWEEP, variant_of

CAPTIONS = {
    "cost": "Accuracy against cost.",
    "gain": "The gain with distillation, seed by seed, and its 95% confidence interval.",
    "curves": "Training curves.",
    "sweep": "The sweep: accuracy on the validation part, by temperature and alpha.",
    "reliability": "Reliability: accuracy against confidence.",
    "dark_knowledge": "What the soft targets carry.",
}


def page(comparison, figures):
    """The page, as text: `comparison` is a reports.comparison.Comparison, `figures` the paths of its PNG files.

    Class names, paths and all other text are escaped, and the page's own policy forbids it to load anything or to run
    any script but its own.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    entry = comparison.kd[0]
    return environment.get_template("report.html.jinja").render(
        entry=entry,
        baseline=comparison.baseline,
        teacher=comparison.teacher,
        gain=points(entry["improvement"]["mean"], "+"),
        trade=costs.trade(comparison),
        claim=claim(entry["improvement"], len(entry["seeds"]), len(comparison.labels), method(entry)),
        note=largest_class(comparison),
        notes=[*differently_trained(comparison), *comparison.notes()],
        tables=_tables(comparison),
        figures=[(CAPTIONS[path.stem], base64.b64encode(path.read_bytes()).decode()) for path in figures],
        settings=comparison.settings.as_dict(),
        environment=comparison.environment,
    )


def _tables(comparison):
    """[(title, column names, rows, what they mean)]: the cells are text, numbers or None."""
    tables = []

    def add(rows, below):
        (title, *columns), *rest = rows
        tables.append((title, ("", *columns), rest, below))

    add(accuracy.rows(comparison), f"{accuracy.where(comparison)}; means over n seeds")
    if tested := accuracy.differences(comparison):
        add(tested, accuracy.DIFFERENCES)
    add(fidelity.rows(comparison), fidelity.where(comparison))
    if scaled := calibration.rows(comparison):
        add(scaled, calibration.where(comparison))
    if "omitted" in comparison.baseline:
        add(omitted.rows(comparison), omitted.where(comparison))

    measured = [
        (name, f"{parameters:,}", f"{macs:,.1f}", *(None if value is None else f"{value:,.1f}" for value in rest))
        for name, parameters, macs, *rest in costs.rows(comparison)
    ]
    columns = ("network", "parameters", "million MACs", "MB", "ms for one image", "images a second")
    tables.append(("What it costs", columns, measured, costs.where(comparison)))

    accuracies = [each["class_accuracies"] for each in (comparison.teacher, comparison.kd[0], comparison.baseline)]
    classes = zip(comparison.classes, *accuracies, strict=True)
    by_class = [(name, *map(decimals, values)) for name, *values in classes]
    tables.append(("Accuracy by class", ("class", "teacher", "with KD", "baseline"), by_class, ""))

    if comparison.selection:
        columns = ("role", "temperature", "alpha", "validation accuracy", "std", "n")
        sweep = []
        for each in comparison.selection:
            pair = variant_of(each) or each["role"], each["temperature"], each["alpha"]
            sweep.append((*pair, decimals(each["mean"]), decimals(each["std"]), len(each["seeds"])))
        note = UNFAIR_SWEEP if comparison.sweep_teacher_has_seen else ""
        tables.append(("Sweep, on the validation part", columns, sweep, note))

    runs = []
    for run in comparison.runs:
        values = run_values(comparison, run)
        values |= {name: decimals(values[name]) for name in ("accuracy", "balanced_accuracy", "val_accuracy")}
        values |= {"seconds": f"{run.seconds:,.0f}", "learning_rate": f"{run.settings.learning_rate:.4g}"}
        runs.append([values[name] for name in COLUMNS])
    tables.append(("Runs", [name.replace("_", " ") for name in COLUMNS], runs, ""))
    return tables
