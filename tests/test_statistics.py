"""The statistics against examples worked by hand, tabulated quantiles and published figures."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from reports.calibration import calibration, fit_temperature, where
from reports.statistics import (
    by_confidence,
    calibration_error,
    class_accuracies,
    holm,
    interval_with_images,
    kl_divergence,
    mcnemar_test,
    negative_log_likelihood,
    paired_test,
    seeds_needed,
    softmax,
    spread,
)

T_QUANTILES = {1: 12.706205, 2: 4.302653, 3: 3.182446, 9: 2.262157, 32: 2.036933, 33: 2.034515}  # t(0.975), printed


def t_statistic(differences):
    """(mean, standard error) of each row, from sums: the standard error is sqrt((sum d^2 - (sum d)^2 / n) / (n - 1) /
    n)."""
    count = differences.shape[-1]
    total, squares = differences.sum(-1), (differences**2).sum(-1)
    return total / count, np.sqrt((squares - total**2 / count) / (count - 1) / count)


def test_the_paired_test_of_students_sleep_data():
    """Student (1908), hours of sleep gained by ten patients with two drugs: p = 0.002833, interval 0.70 to 2.46."""
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    got = paired_test([b - a for a, b in zip(one, two, strict=True)])
    assert got["mean"] == pytest.approx(1.58)
    assert got["p_value"] == pytest.approx(0.002833, abs=5e-7)
    assert got["ci95"] == pytest.approx([0.7001142, 2.4598858], abs=5e-7)


@pytest.mark.parametrize("count", [2, 3, 4, 10, 33, 34])
def test_the_interval_from_sums_and_a_tabulated_quantile(count):
    differences = np.random.default_rng(count).normal(0.3, 0.5, count)
    mean, error = t_statistic(differences)
    half = T_QUANTILES[count - 1] * error
    assert paired_test(list(differences))["ci95"] == pytest.approx([mean - half, mean + half], rel=1e-5)


@pytest.mark.parametrize("differences", [[1.0, 2.0, 3.0], [0.1, -0.4, 0.2], [-3.0, -2.0, -2.5]])
def test_the_p_value_of_three_pairs_in_closed_form(differences):
    """With two degrees of freedom the two-sided p is 1 - |t| / sqrt(t^2 + 2)."""
    mean, error = t_statistic(np.array(differences))
    t = abs(mean) / error
    assert paired_test(differences)["p_value"] == pytest.approx(1 - t / math.sqrt(t**2 + 2))


def test_the_p_value_of_two_pairs_in_closed_form():
    """With one degree of freedom it is 1 - 2 / pi atan |t|; for differences 1 and 2, t is 3."""
    assert paired_test([1.0, 2.0])["p_value"] == pytest.approx(1 - 2 / math.pi * math.atan(3))


@pytest.mark.parametrize("differences", [[0.3], [0.3, 0.3, 0.3], [0.0, 0.0], [0.1, 0.1, 0.1]])
def test_undefined_statistics_are_none_and_never_nan(differences):
    got = paired_test(differences)
    assert got["ci95"] is None and got["p_value"] is None and got["mean"] == pytest.approx(differences[0])
    assert "NaN" not in json.dumps(got)


def test_gains_that_are_equal_up_to_rounding_have_no_interval():
    """A gain of 25 images of 10,000, computed from three different accuracies."""
    gains = [100 * (a - b) / 10_000 for a, b in ((9022, 8997), (9010, 8985), (8950, 8925))]
    assert paired_test(gains)["p_value"] is None


def test_the_interval_with_images_by_hand():
    """Rows 1 0 0 0, 1 1 1 0: means 1/4, 3/4, of columns 1, 1/2, 1/2, 0. Mean squares: of rows 4 * 1/8, of columns 2 *
    1/6, of the rest 1/2 / 3. So the variance is (1/2 + 1/3 - 1/6) / 8 = 1/12, and Satterthwaite's degrees of freedom
    (2/3)^2 / (1/4 + 1/9 / 3 + 1/36 / 3) = 1.5; with those of the rows alone, 1, the interval would be 12.706 * 1/4."""
    low, high = interval_with_images([[1, 0, 0, 0], [1, 1, 1, 0]])
    half = max(stats.t.ppf(0.975, 1.5) / 12**0.5, 12.706205 / 4)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)
    # Rows -1, 0 and 1 plus columns -3, -1, 1 and 3, and a rest of 1 or -1, in the second row of -2 or 2. Mean squares:
    # 4, 3 * 20/3 and 24 / 6; so the variance is (4 + 20 - 4) / 12, and the degrees of freedom are 2.78.
    half = stats.t.ppf(0.975, 400 / (4**2 / 2 + 20**2 / 3 + 4**2 / 6)) * (20 / 12) ** 0.5
    wide = np.add.outer([-1, 0, 1], [-3, -1, 1, 3]) + np.outer([1, -2, 1], [1, -1, -1, 1])
    assert half > 4.2 and interval_with_images(wide + 0.5) == pytest.approx([0.5 - half, 0.5 + half])
    for none in ([[1, 0, 1]], [[1], [0]], [[0, 0], [0, 0]], [[100, 0, 0, 0], [0, 100, 0, 0]]):
        assert interval_with_images(none) is None


@pytest.mark.parametrize("images", [20, 400])
def test_the_interval_with_images_holds_the_mean_of_all_seeds_and_images(images):
    """Of 1,000 draws of 4 seeds and so many images, whose gains have a common part, at least 93% hold the true mean;
    of the intervals over seeds alone, far fewer where images are few."""
    random, held, held_by_seeds = np.random.default_rng(1), 0, 0
    for _ in range(1_000):
        gains = 0.3 + random.normal(0, 0.1, (4, 1)) + random.normal(0, 1, images) + random.normal(0, 1, (4, images))
        low, high = interval_with_images(gains)
        held += low <= 0.3 <= high
        low, high = paired_test(gains.mean(1).tolist())["ci95"]
        held_by_seeds += low <= 0.3 <= high
    assert held >= 0.93 * 1_000 and held_by_seeds < (0.88 if images == 20 else 0.96) * 1_000


@pytest.mark.parametrize(("seeds", "images"), [(2, 4), (2, 20), (3, 50), (5, 20)])
def test_the_interval_with_images_is_finite_and_of_sensible_width(seeds, images):
    """Where seeds hardly differ and images no more than the rest, degrees of freedom near 0 would make it endless."""
    random, found = np.random.default_rng(2), 0
    for _ in range(500):
        gains = random.choice([-100.0, 0.0, 0.0, 0.0, 100.0], (seeds, images))
        ends = interval_with_images(gains)
        if ends:
            found += 1
            squares = gains.var() * seeds * images / (seeds - 1)  # all of the variance, laid on the seeds
            assert np.isfinite(ends).all() and ends[1] - ends[0] <= 2 * 12.7063 * (squares / seeds) ** 0.5
    assert found > 400


def test_an_image_more_in_every_seed_is_as_good_as_the_images_alone():
    """Where seeds differ in nothing, the interval is that of a t-test over the images."""
    images = np.random.default_rng(0).normal(0.2, 1, 50)
    found = stats.ttest_1samp(images, 0).confidence_interval(0.95)
    assert interval_with_images([images, images, images]) == pytest.approx([found.low, found.high])


def test_holms_correction_of_four_tests_by_hand():
    """Sorted, the four are multiplied by 4, 3, 2 and 1, and none is below the one before."""
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(("fixed", "broken"), [(9, 1), (1, 9), (5, 0), (13, 7), (60, 50)])
def test_mcnemar_is_the_two_sided_binomial_test(fixed, broken):
    """Twice the smaller tail of Binomial(n, 1/2); for 9 and 1 it is 2 (C(10, 0) + C(10, 1)) / 2^10 = 22 / 1024."""
    count = fixed + broken
    tail = sum(math.comb(count, k) for k in range(min(fixed, broken) + 1)) / 2**count
    assert mcnemar_test(fixed, broken) == pytest.approx(2 * tail)


def test_mcnemar_without_a_difference_is_1():
    assert mcnemar_test(0, 0) == 1.0 and mcnemar_test(4, 4) == pytest.approx(1.0)


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_needed_agree_with_cohens_tables(effect, pairs):
    """The sample sizes of a paired t-test at 80% power and 5%, two-sided, for Cohen's (1988) small, medium and large
    effects, as G*Power gives them."""
    assert seeds_needed(deviation=1 / effect, gain=1.0) == pairs


@pytest.mark.parametrize(("deviation", "pairs"), [(0.005, 2), (0.0328, 3), (0.0505, 3), (0.11, 4), (0.5, 34)])
def test_seeds_needed_agree_with_drawn_comparisons(deviation, pairs):
    """For a gain of 0.25: of many drawn comparisons with so many pairs more than 80% are significant, with one pair
    fewer less than 80%."""
    assert seeds_needed(deviation) == pairs
    draws = np.random.default_rng(0).normal(0.25, deviation, (40_000, pairs))
    for count in {pairs, max(2, pairs - 1)}:
        mean, error = t_statistic(draws[:, :count])
        power = (abs(mean) > T_QUANTILES[count - 1] * error).mean()
        assert (power > 0.8) == (count == pairs), power


def test_seeds_needed_is_none_above_half_a_million():
    assert seeds_needed(deviation=1000.0) is None


def test_spread_is_the_sample_standard_deviation():
    assert spread([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3))
    assert spread([1.0]) is None


def test_calibration_error_by_hand():
    """Three images at 0.6 of which one is right and one at 0.9, right: 3/4 |1/3 - 0.6| + 1/4 |1 - 0.9| = 0.225."""
    probabilities = np.array([[0.6, 0.4], [0.6, 0.4], [0.6, 0.4], [0.1, 0.9]])
    labels = np.array([0, 1, 1, 1])
    assert calibration_error(probabilities, labels) == pytest.approx(0.225)
    share, confidence, accuracy = by_confidence(probabilities.max(1), np.array([True, False, False, True]))
    assert share.sum() == pytest.approx(1) and share[8] == 0.75 and share[13] == 0.25  # (8/15, 9/15], (13/15, 14/15]
    assert accuracy[8] == pytest.approx(1 / 3) and confidence[13] == pytest.approx(0.9)
    assert np.flatnonzero(confidence).tolist() == np.flatnonzero(accuracy).tolist() == [8, 13]  # 0 in empty bins


def test_the_fitted_temperature_by_hand():
    """Of images with logits (s, 0) a share r has the label 0: the likelihood is largest where sigmoid(s / T) = r."""
    logits, labels = np.tile([3.0, 0.0], (10, 1)), np.array([0] * 7 + [1] * 3)
    assert fit_temperature(logits, labels) == pytest.approx(3 / math.log(7 / 3), rel=1e-4)
    assert 1 / 20 <= fit_temperature(logits, np.zeros(10, int)) < 0.1  # all right: the sharper the better


def test_overconfident_logits_are_mended():
    """Labels drawn from the softmax of logits which are then sharpened by 1.7, one half of them by 1.2 as well."""
    draws = np.random.default_rng(0)
    logits = draws.normal(0, 2, (40_000, 5))
    labels = (logits + draws.gumbel(size=logits.shape)).argmax(1)  # the Gumbel-max trick
    found = calibration(1.7 * logits, labels)
    assert found["fitted_temperature"] == pytest.approx(1.7, rel=0.03)
    assert found["calibration_error"] > 0.05 > 0.01 > found["scaled_calibration_error"]
    true = -np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(len(labels)), labels].mean()
    assert found["scaled_negative_log_likelihood"] == pytest.approx(true, abs=1e-3)
    assert found["negative_log_likelihood"] > true + 0.01


def test_no_image_is_judged_at_a_temperature_that_it_helped_to_choose():
    """The two halves would suit temperatures of 3 / log 4 and 3 / log 1.5; each is judged at the other's."""
    logits, labels = np.tile([3.0, 0.0], (20, 1)), np.zeros(20, int)
    labels[[0, 2]] = labels[[1, 3, 5, 7]] = 1  # of ten even ones 8 are right, of ten odd ones 6
    even, odd = 1 / (1 + 1.5**-1), 1 / (1 + 4**-1)  # the confidence that the other half asks for
    by_hand = -(8 * math.log(even) + 2 * math.log(1 - even) + 6 * math.log(odd) + 4 * math.log(1 - odd)) / 20
    found = calibration(logits, labels)
    assert found["scaled_negative_log_likelihood"] == pytest.approx(by_hand, rel=1e-4)
    assert found["fitted_temperature"] == pytest.approx(3 / math.sqrt(math.log(4) * math.log(1.5)), rel=1e-4)
    assert calibration(logits[:1], labels[:1])["fitted_temperature"] is None


@pytest.mark.parametrize(
    ("temperature", "before", "after", "advised"),
    [(1.44, 0.264, 0.238, "1.4"), (0.8, 0.5, 0.48, "0.8"), (1.05, 0.264, 0.2635, None), (0.06, 0.02, 0.0, None)],
)
def test_a_temperature_is_advised_where_it_pays(temperature, before, after, advised):
    """Not for less than a hundredth of the likelihood, and not where nearly all images are right."""
    names = ("fitted_temperature", "negative_log_likelihood", "scaled_negative_log_likelihood")
    comparison = SimpleNamespace(kd=[{k: [v] for k, v in zip(names, (temperature, before, after), strict=True)}])
    text = where(comparison)
    assert "--export --temperature " + advised in text if advised else "--export" not in text


def test_certain_predictions_are_in_the_last_bin():
    share, confidence, accuracy = by_confidence(np.ones(2), np.array([True, False]))
    assert (share[-1], confidence[-1], accuracy[-1]) == (1.0, 1.0, 0.5)


def test_negative_log_likelihood_by_hand():
    logits = np.array([[math.log(3), 0.0], [0.0, 0.0], [5e4, 0.0]])
    expected = (-math.log(0.75) - math.log(0.5) + 5e4) / 3
    assert negative_log_likelihood(logits, np.array([0, 1, 1])) == pytest.approx(expected)


def test_what_cannot_be_negative_is_never_printed_so():
    logits = np.array([[1e3, 0.0, 0.0]])
    assert f"{negative_log_likelihood(logits, np.array([0])):.4f}" == "0.0000"
    random = np.random.default_rng(0)
    for _ in range(20):
        logits = random.normal(0, 3, (5, 4))
        shifted = logits + 1e3 * random.normal(size=(5, 1))  # the same probabilities up to rounding
        assert f"{kl_divergence(logits, shifted):.4f}" == "0.0000"


def test_softmax_by_hand_and_at_a_temperature():
    np.testing.assert_allclose(softmax([[2 * math.log(3), 0]], 2), [[0.75, 0.25]])
    logits = np.random.default_rng(0).normal(0, 3, (4, 5))
    powers = np.exp(logits / 4)
    np.testing.assert_allclose(softmax(logits, 4), powers / powers.sum(1, keepdims=True))


def test_softmax_of_huge_float32_logits_is_finite_and_float64():
    got = softmax(np.array([[1e6, -1e6]], np.float32))
    assert got.tolist() == [[1.0, 0.0]] and got.dtype == np.float64


def test_class_accuracies_by_hand():
    logits = np.eye(3)[[0, 0, 1, 1]]
    assert class_accuracies(logits, np.array([0, 1, 1, 1]), 3) == [1.0, pytest.approx(2 / 3), None]


def test_the_kl_divergence_by_hand():
    """Teacher (2 ln 3, 0) against student (0, 0): at T = 1 (9/10, 1/10), at T = 2 (3/4, 1/4) against halves."""
    teacher, student = [[2 * math.log(3), 0]] * 3, [[7, 7]] * 3
    at_1 = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert kl_divergence(teacher, student) == pytest.approx(at_1)
    assert kl_divergence(teacher, student, 2.0) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl_divergence(student, teacher) == pytest.approx(0.5 * math.log(1 / 1.8) + 0.5 * math.log(1 / 0.2))
    assert kl_divergence([*teacher[:2], student[0]], student) == pytest.approx(at_1 * 2 / 3)
