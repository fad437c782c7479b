"""Statistics of test logits and of paired runs: pure NumPy and SciPy, each with its source.

- Expected calibration error: Guo et al., arXiv 1706.04599, equation 3, with 15 bins of equal width.
- Balanced accuracy: the mean of the accuracies by class.
- Negative log-likelihood: the mean of -log p(label), in nats.
- KL from teacher to student: Kullback and Leibler 1951, how far the student's probabilities are from the teacher's.
- Paired t-test over seeds (Student 1908), the pairs being students of one seed with and without distillation.
- The same mean for other test images as well as other seeds: variance components of a crossed layout without
  replication, with the degrees of freedom of Satterthwaite (Biometrics Bulletin 2, 1946).
- Exact McNemar test (McNemar 1947) for a single pair: a binomial test over the test images on which they differ.
"""

import math

import numpy as np
from scipy import special, stats

BINS = 15
POWER, SIGNIFICANCE, SMALL_GAIN = 0.8, 0.05, 0.25  # the last in percentage points: the gain of the original run


def softmax(logits, temperature=1.0):
    """Probabilities (N, classes) of logits (N, classes) at a temperature, in float64."""
    return special.softmax(np.asarray(logits, np.float64) / temperature, axis=1)


def by_confidence(confidence, right):
    """(share of images, mean confidence, accuracy) of each of BINS equal bins of confidence, three arrays (BINS,), 0
    where a bin is empty; from each image's confidence and whether it is right, two arrays (N,)."""
    # Bin m holds the confidences in ((m - 1) / BINS, m / BINS].
    number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(number, minlength=BINS)
    sums = (np.bincount(number, values, BINS) for values in (confidence, right))
    mean_confidence, mean_accuracy = (total / np.maximum(count, 1) for total in sums)
    return count / len(right), mean_confidence, mean_accuracy


def calibration_error(probabilities, labels):
    """The expected calibration error, from 0 to 1."""
    share, confidence, accuracy = by_confidence(probabilities.max(1), probabilities.argmax(1) == labels)
    return float((share * np.abs(accuracy - confidence)).sum())


def negative_log_likelihood(logits, labels):
    """The mean of -log softmax(logits)[label], in nats."""
    of_labels = special.log_softmax(np.asarray(logits, np.float64), axis=1)[np.arange(len(labels)), labels]
    return 0.0 - float(of_labels.mean())  # not -mean, which may be -0.0


def kl_divergence(teacher_logits, student_logits, temperature=1.0):
    """KL(softmax(teacher / T) || softmax(student / T)) of logits (N, classes), the mean over N, in nats."""
    both = (teacher_logits, student_logits)
    teacher, student = (special.log_softmax(np.asarray(each, np.float64) / temperature, axis=1) for each in both)
    return max(float((np.exp(teacher) * (teacher - student)).sum(1).mean()), 0.0)  # less is rounding


def class_accuracies(logits, labels, classes):
    """The accuracy on each class's images: a list of floats, None for a class without images."""
    right = logits.argmax(1) == labels
    return [float(right[labels == k].mean()) if (labels == k).any() else None for k in range(classes)]


def balanced_accuracy(by_class):
    """The mean of `class_accuracies` over the classes that have images (Brodersen et al., ICPR 2010): to answer the
    largest class always gains nothing here."""
    return float(np.mean([value for value in by_class if value is not None]))


def spread(values):
    """The standard deviation with ddof 1, None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_test(differences):
    """The paired t-test of `differences` (a list, one a seed): their mean, 95% confidence interval and two-sided p.

    Interval and p are None where they are undefined: for one difference, or for differences that are all equal.
    """
    result = {"mean": float(np.mean(differences)), "ci95": None, "p_value": None, "method": "paired t-test"}
    if np.ptp(differences) < 1e-9:  # equal up to rounding: no spread to compute an interval from
        return result
    test = stats.ttest_1samp(differences, 0)
    low, high = test.confidence_interval(0.95)
    return result | {"ci95": [float(low), float(high)], "p_value": float(test.pvalue)}


def interval_with_images(gains):
    """[low, high], the 95% confidence interval of the mean of `gains` (seeds, images), were other seeds and other test
    images drawn; None for fewer than two of either, or where neither seeds nor images differ more than the rest does.

    Of a mean over S seeds and N images the variance is (MS_seeds + MS_images - MS_rest) / (S N), each a mean square of
    the two-way layout whose rows and columns are both random. `paired_test` of the rows' means leaves out what images
    add, which is little for 10,000 and much for 100; this interval is never the narrower one. Since a mean square is
    subtracted, Satterthwaite's degrees of freedom may come out near 0; they are taken as S - 1 at least.
    """
    gains = np.asarray(gains, np.float64)
    seeds, images = gains.shape
    if min(seeds, images) < 2:
        return None
    rows, columns, mean = gains.mean(1), gains.mean(0), gains.mean()
    rest = gains - rows[:, None] - columns + mean
    freedoms = np.array([seeds - 1, images - 1, (seeds - 1) * (images - 1)])
    squares = np.array([images * rows.var(ddof=1), seeds * columns.var(ddof=1), (rest**2).sum() / freedoms[2]])
    of_seeds, of_images = squares[0], max(squares[1] - squares[2], 0.0)
    if of_seeds + of_images < 1e-9:  # zero up to rounding
        return None
    freedom = (of_seeds + of_images) ** 2 / (squares**2 / freedoms)[: 3 if of_images else 1].sum()
    freedom = max(freedom, seeds - 1)
    half = stats.t.ppf(0.975, freedom) * math.sqrt((of_seeds + of_images) / gains.size)
    half = max(half, stats.t.ppf(0.975, seeds - 1) * math.sqrt(of_seeds / gains.size))
    return [float(mean - half), float(mean + half)]


def holm(p_values):
    """The `p_values` (a list; None: not tested) corrected for being several: those below a level hold together at that
    level (Holm 1979)."""
    order = sorted((p, position) for position, p in enumerate(p_values) if p is not None)
    corrected, largest = [None] * len(p_values), 0.0
    for rank, (p, position) in enumerate(order):
        corrected[position] = largest = max(largest, min(1.0, p * (len(order) - rank)))
    return corrected


def mcnemar_test(fixed, broken):
    """The two-sided p of the exact McNemar test: `fixed` images are right only with distillation, `broken` only
    without."""
    return float(stats.binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0


def seeds_needed(deviation, gain=SMALL_GAIN):
    """The fewest pairs with which a paired t-test shows a mean difference of `gain` with a power of POWER, given the
    standard deviation of the differences (Cohen 1988). None above 2^19.

    The power is that of the noncentral F distribution of t squared, since SciPy's noncentral t gives NaN for some small
    deviations."""

    def reached(pairs):
        critical = stats.t.ppf(1 - SIGNIFICANCE / 2, pairs - 1)
        shift = gain / deviation * math.sqrt(pairs)
        return stats.ncf.sf(critical**2, 1, pairs - 1, shift**2) >= POWER

    low, high = 1, 2
    while not reached(high):
        low, high = high, high * 2
        if high > 2**19:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
