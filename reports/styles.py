"""What all figures share. Colours are Okabe and Ito's, which the colour-blind tell apart; line styles and hatches tell
roles apart in grey."""

from matplotlib import rcParamsDefault
from matplotlib.font_manager import fontManager

STYLES = {
    "teacher": {"color": "#000000", "linestyle": ":", "hatch": None, "label": "teacher"},
    "kd": {"color": "#D55E00", "linestyle": "-", "hatch": None, "label": "student with KD"},
    "baseline": {"color": "#0072B2", "linestyle": "--", "hatch": "//", "label": "student, baseline"},
}
PAIRS = (
    ("#D55E00", "-"), ("#E69F00", "-."), ("#CC79A7", (0, (1, 1))), ("#009E73", (0, (5, 1, 1, 1))),
    ("#56B4E9", (0, (6, 2))),
)  # fmt: skip
MARKERS = "Dvp*"  # of the pairs of each round through PAIRS
EAST_ASIAN = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Source Han Sans", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo",
)  # fmt: skip


def role_line(role):
    return {name: STYLES[role][name] for name in ("color", "linestyle", "label")}


def pair_style(number):
    """(color, line style, marker) of the pair of temperature and alpha with this number."""
    return *PAIRS[number % len(PAIRS)], MARKERS[number // len(PAIRS) % len(MARKERS)]


def family():
    """The fonts that letters are taken from: matplotlib's own, and for East Asian ones those that are installed."""
    installed = {font.name for font in fontManager.ttflist}
    return [*rcParamsDefault["font.sans-serif"][:1], *(name for name in EAST_ASIAN if name in installed)]


def shortened(name, length):
    """A name of at most `length` characters, the middle left out of a longer one: names often begin alike."""
    end = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - end]}…{name[-end:]}"


def broken(title, length):
    """A title that names a pair of temperature and alpha, on two lines where it is longer than `length` characters."""
    return title if len(title) <= length else title.replace(", T=", ",\nT=")


def legend(figure, panels, columns):
    """One legend below all panels, each entry once, in at most so many columns."""
    entries = {}
    for axes in panels:
        handles, names = axes.get_legend_handles_labels()
        entries = dict(zip(names, handles, strict=True)) | entries  # as in the first panel that has it
    columns = min(columns, max(1, int(figure.get_figwidth() / (0.6 + 0.066 * max(map(len, entries))))))  # inches
    figure.legend(entries.values(), entries.keys(), frameon=False, loc="outside lower center", ncols=columns)
