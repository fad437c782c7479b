"""Which sample is black and which is white in images of more than 8 bits.

No file says which sample is white in such an image, except in formats that declare it: 16 bits may hold
12-bit values, floats lie from 0 to 1 or to 255. So a range is decided once for each kind of sample in a whole data set
(`decide`) and holds for all of its images; one of its own for every image would make them incomparable.
"""

# Where no data set decides; other kinds have none.
ALPHA = "16-bit alpha"
DOCUMENTED = {"16-bit": (0, 65535), "floating-point": (0, 1), ALPHA: (0, 65535)}
WHITES = {1, 255, *(2**bits - 1 for bits in (8, 10, 12, 14, 16))}  # of ranges from 0 that `decide` takes from no data


def decide(samples):
    """{kind: (black, white)} of a data set whose images hold the `samples`, triples (kind, low, high).

    Floating-point samples: from 0 to 1, where all lie there, or to 255, where the greatest is above half of that. Whole
    numbers without a sign of up to 16 bits: to the largest number of the fewest usual bits (8, 10, 12, 14, 16) that
    hold all. Any others: from the least to the greatest of the data set. Alpha has the range of the colours, as some
    writers scale them together, or else all 16 bits.
    """
    found = {}
    for kind, low, high in samples:
        least, most = found.get(kind, (low, high))
        found[kind] = (min(least, low), max(most, high))
    ranges = {}
    for kind, (low, high) in sorted(found.items()):  # "16-bit" before its alpha
        if kind == "floating-point":
            whites = [1, 255] if high > 127.5 else [1]
        else:
            whites = [ranges["16-bit"][1], 65535] if kind == ALPHA else [2**bits - 1 for bits in (8, 10, 12, 14, 16)]
        white = next((white for white in whites if low >= 0 and high <= white), None)
        ranges[kind] = (low, high) if white is None else (0, white)
    return ranges


def beyond(samples, ranges):
    """Those of an image's `samples`, triples (kind, low, high), that lie outside of their range."""
    return [(kind, low, high) for kind, low, high in samples if low < ranges[kind][0] or high > ranges[kind][1]]


def out_of_range(samples, ranges):
    """Why an image with these `samples` cannot be scaled by `ranges`, one of which is a usual one and too small; None
    where it can. Kinds of samples without a range are passed over."""
    known = [each for each in samples if each[0] in ranges]
    for kind, low, high in beyond(known, ranges):
        black, white = ranges[kind]
        if black == 0 and white in WHITES:
            span = f"lie from {plain(low)} to {plain(high)}, outside of the range from {plain(black)} to {plain(white)}"
            return f"its samples ({kind}) {span}"
    return None


def plain(value):
    """A sample as people write it: 4,095 or 0.999756."""
    return f"{int(value):,}" if value == int(value) else f"{value:.6g}"
