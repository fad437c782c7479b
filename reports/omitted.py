"""Classes that the students were never shown: what they know of them all the same.

Hinton, Vinyals and Dean, arXiv 1503.02531, section 3: a student distilled without a single image of the digit 3 knows
it once the bias of that class is raised.
"""

import numpy as np

from reports.accuracy import decimals
from reports.statistics import spread


def omitted_classes(runs, logits, labels, classes):
    """{"omitted": what comparison.json says of the classes that `runs`, students of several seeds, were not shown}, or
    {} where there are none.

    `logits` are theirs on the test set, a list of (N, classes). `accuracies` are on the images of the omitted classes
    alone; the corrected ones, on these and on all, with each run's `bias` added to the logits of these classes.
    """
    names = runs[0].settings.omit_class
    if not names:
        return {}
    numbers = [classes.index(name) for name in names]
    those = np.isin(labels, numbers)
    biases = [run.omitted_bias for run in runs]
    shifts = [np.where(np.isin(np.arange(len(classes)), numbers), bias, 0.0) for bias in biases]
    right = [each.argmax(1) == labels for each in logits]
    corrected = [(each + shift).argmax(1) == labels for each, shift in zip(logits, shifts, strict=True)]
    return {
        "omitted": {
            "classes": list(names),
            "bias": biases,
            "accuracies": [float(each[those].mean()) for each in right],
            "corrected_accuracies": [float(each[those].mean()) for each in corrected],
            "corrected_accuracies_on_all": [float(each.mean()) for each in corrected],
        }
    }


def rows(comparison):
    """The rows of the printed table: means over the seeds."""
    found = [("Not shown to students", "on these", "std", "corrected", "std", "all, corr.", "bias")]
    for name, entry in comparison.students:
        given = entry["omitted"]
        cells = []
        for values in (given["accuracies"], given["corrected_accuracies"]):
            cells += [decimals(np.mean(values)), decimals(spread(values))]
        all_of_them = np.mean(given["corrected_accuracies_on_all"])
        found.append((name, *cells, f"{all_of_them:.4f}", f"{np.mean(given['bias']):+.2f}"))
    return found


def where(comparison):
    """What the table means, in words."""
    names = ", ".join(comparison.baseline["omitted"]["classes"])
    return (
        f"accuracy on test images of {names}; corrected: with a bias added to the logits, such that as many training\n"
        "images are taken for these as there are; found without their labels, and without the test set;\n"
        "all, corr.: accuracy on all test images with that bias"
    )
