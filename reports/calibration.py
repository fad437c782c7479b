"""Does a network know how sure it may be? And does it once one temperature has been fitted to its logits?

Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599, section 4.2: dividing all logits by the
temperature that minimizes the negative log-likelihood on held-out images changes no answer and mends most of what is
wrong with the probabilities. Distilled students may need it: on CIFAR-10 they are overconfident.
"""

import math

import numpy as np
from scipy import optimize

from reports.statistics import calibration_error, negative_log_likelihood, softmax

LARGEST = 20.0  # fitted temperature; the smallest is its inverse
SCALED = ("fitted_temperature", "scaled_calibration_error", "scaled_negative_log_likelihood")
WORTH = 0.01  # of the negative log-likelihood: what a temperature must save to be advised


def fit_temperature(logits, labels):
    """The temperature, from 1 / LARGEST to LARGEST, at which `logits` (N, classes) have the smallest negative
    log-likelihood; in 1 / temperature that is convex, so the minimum is the only one."""
    bound = math.log(LARGEST)

    def likelihood(log_temperature):
        return negative_log_likelihood(logits / math.exp(log_temperature), labels)

    return math.exp(optimize.minimize_scalar(likelihood, bounds=(-bound, bound), method="bounded").x)


def calibration(logits, labels):
    """What comparison.json says of a network's probabilities on the test set, as they are and scaled: every second
    image's logits are divided by the temperature fitted to the other images, and those by the temperature fitted to
    these, so that no image is judged at a temperature that it helped to choose. Scaled values of one image are None."""
    logits = np.asarray(logits, np.float64)
    found = {
        "calibration_error": calibration_error(softmax(logits), labels),
        "negative_log_likelihood": negative_log_likelihood(logits, labels),
    }
    second = np.arange(len(labels)) % 2 == 1
    if not second.any():
        return found | dict.fromkeys(SCALED)
    temperatures = [fit_temperature(logits[half], labels[half]) for half in (second, ~second)]
    scaled = logits / np.where(second, temperatures[1], temperatures[0])[:, None]
    error, likelihood = calibration_error(softmax(scaled), labels), negative_log_likelihood(scaled, labels)
    return found | dict(zip(SCALED, (math.sqrt(math.prod(temperatures)), error, likelihood), strict=True))


def rows(comparison):
    """The rows of the printed table: means over the seeds; none for a single test image."""
    if comparison.teacher["fitted_temperature"] is None:
        return []
    found = [("Temperature scaling", "fitted T", "ECE", "NLL")]
    for name, entry in [("Teacher", comparison.teacher), *comparison.students]:
        temperature, error, likelihood = (np.mean(entry[key]) for key in SCALED)
        found.append((name, f"{temperature:.2f}", f"{error:.4f}", f"{likelihood:.4f}"))
    return found


def where(comparison):
    """What the table means, in words, and what to do about it."""
    words = (
        "logits divided by the temperature that suits half of the test images best, judged on the other half;\n"
        "above 1 a network is overconfident"
    )
    entry = comparison.kd[0]
    before, after = (np.mean(entry[key]) for key in ("negative_log_likelihood", "scaled_negative_log_likelihood"))
    temperature = np.mean(entry["fitted_temperature"])
    if after > (1 - WORTH) * before or not 2 / LARGEST < temperature < LARGEST / 2:  # nearly all images right, or few
        return words
    return (
        f"{words}; where the probabilities of the student with KD matter, give --predict and\n"
        f"--export --temperature {temperature:.2g}"
    )
