"""What teacher and student cost: the printed table, and the trade in one sentence."""

from reports.statistics import SIGNIFICANCE

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
EQUAL = 1.05  # a ratio of speeds below this is a measurement's noise


def rows(comparison):
    """Rows of (name, parameters, million multiply-adds, megabytes of model.pt, milliseconds for one image, images a
    second in batches), the last three None where they were not measured; a row for each precision."""
    found = []
    for name, entry in (("Teacher", comparison.teacher), ("Student", comparison.student)):
        cost, shapes = entry["cost"], (entry["parameters"], entry["macs"] / 1e6)
        if cost is None:
            found.append((name, *shapes, None, None, None))
            continue
        for precision, words in PRECISIONS.items():
            if precision in cost:
                speed = cost[precision]
                measured = (cost["bytes"] / 1e6, speed["milliseconds"], speed["images_per_second"])
                found.append((f"{name}, {words}", *shapes, *measured))
    return found


def where(comparison):
    """On what the speed was measured, in words."""
    cost = comparison.student["cost"]
    if cost is None:
        return "The speed was not measured yet: repeat the command that trained the students."
    threads = f"{cost['threads']} thread{'s' * (cost['threads'] > 1)}"
    return f"MB: of model.pt; speed on {cost['device']}, {threads}, one image and batches of {cost['batch']}"


def trade(comparison):
    """The trade in a sentence: how much smaller, faster (in batches, float32) and less accurate the student with KD is
    than the teacher, and how much of that distillation recovers. Means over the seeds."""
    entry, baseline, teacher = comparison.kd[0], comparison.baseline, comparison.teacher
    several = len(teacher["members"])
    who = f"the {several} teachers together" if several > 1 else "the teacher"
    lost = 100 * (teacher["accuracy"] - entry["mean"])
    parts, sizes = [], [each["parameters"] for each in (teacher, comparison.student)]
    if all(sizes):  # a network's weights may be constants
        parts.append(_times(sizes[0] / sizes[1], "smaller", "larger", "as large"))
    if comparison.student["cost"]:
        fast = [each["cost"]["fp32"]["images_per_second"] for each in (comparison.student, teacher)]
        parts.append(_times(fast[0] / fast[1], "faster", "slower", "as fast") + " (float32, in batches)")
    as_accurate = f"{_points(lost)} less accurate" if lost > 0 else f"{_points(-lost)} more accurate"
    as_accurate = as_accurate if round(abs(lost), 2) else "as accurate"
    words = f"Compared with {who} the student is {' and '.join([', '.join(parts)] * bool(parts) + [as_accurate])}"
    return f"{words}; {_recovered(entry, teacher['accuracy'], baseline['mean'])}."


def _recovered(entry, teacher, baseline):
    """What distillation does about the gap between the baseline and the teacher, in words."""
    improvement, gap = entry["improvement"], 100 * (teacher - baseline)
    gain = improvement["mean"]
    if round(abs(gain), 2) == 0:
        done = "distillation changes nothing" if gap <= 0 else f"distillation recovers none of the {_points(gap)}"
    elif gain < 0:
        done = f"distillation costs {_points(-gain)}"
    elif gap <= 0:
        done = f"distillation adds {_points(gain)} to a baseline that is no worse than the teacher"
    elif gain > gap:
        done = f"distillation recovers all of the {_points(gap)} between baseline and teacher"
    else:
        done = f"distillation recovers {_number(gain)} of {_points(gap)}"
    seeds, p = len(entry["seeds"]), improvement["p_value"]
    if seeds == 1:
        return f"{done} (one pair of students)"
    shown = p is None or p < SIGNIFICANCE
    return f"{done} (mean of {seeds} seeds{'' if shown or not round(abs(gain), 2) else ', not significant'})"


def _times(ratio, more, less, equal):
    if 1 / EQUAL < ratio < EQUAL:
        return equal
    return f"{ratio:.1f} times {more}" if ratio > 1 else f"{1 / ratio:.1f} times {less}"


def _points(value):
    return f"{_number(value)} points"


def _number(value):
    return f"{value:.1f}" if value >= 0.1 else f"{value:.2f}"
