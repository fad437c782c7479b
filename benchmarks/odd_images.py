"""Image files as people have them, of nearly every kind, with the pixels that they must become.

`fuzz(count, seed)` makes them. What is expected is computed with NumPy from the samples that were written, never from
what Pillow reads back; PNG, TIFF and PNM files of many kinds are written here byte by byte, since Pillow writes few.
"""

import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIZE = 16  # of the pixels that files must become
WHITE16, SIGNED, WIDE = 4095, (-1000, 3000), (0, 1_000_000)  # every such file reaches them: ranges are known beforehand
JPEG_ERROR = 12  # at quality 100, on smooth images


@dataclass
class Odd:
    """A file: its `name` (bytes), `content`, and `expected` pixels, float (SIZE, SIZE, 3), within `tolerance`; None
    where it must be refused. With `may_fail` it may be refused, too: it was cut short, or not every Pillow reads it."""

    name: bytes
    content: bytes
    expected: np.ndarray | None
    tolerance: float = 0.51
    may_fail: bool = False
    kind: str = ""


def fuzz(count, seed=0):
    """`count` files of all kinds, in turn, each an Odd with a different name."""
    random = np.random.default_rng(seed)
    Image.init()
    for number in range(count):
        make = KINDS[number % len(KINDS)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            suffix, content, expected, *rest = make(random)
        odd = Odd(b"", content, expected, *rest, kind=make.__name__)
        if expected is not None and random.random() < 0.15:
            odd.content, odd.may_fail = content[: random.integers(0, len(content))], True
        if random.random() < 0.15:
            suffix = random.choice([".png", ".jpg", ".tif", ".BMP", ".gif", ".webp", ".ppm"])
        odd.name = _odd_name(random, number) + suffix.encode()
        yield odd


def _odd_name(random, number):
    words = (
        "bild",
        "фото",
        "写真",
        "a b",
        "quote\"'",
        "new\nline",
        "-rf",
        "%s{0}",
        "x" * 180,
        "tab\t",
        "é",
        "semi;$(x)",
    )
    stem = os.fsencode(str(random.choice(words)))
    if os.name == "posix" and random.random() < 0.05:
        stem += b"\xff"  # no UTF-8
    return stem + b"-%d" % number


# Pixels ---------------------------------------------------------------------------------------------------------------


def _samples(random, top, bands=0, shape=None):
    """Whole numbers from 0 to `top`, both of which occur."""
    shape = shape or (SIZE, SIZE)
    values = random.integers(0, top + 1, (*shape, bands) if bands else shape)
    values.flat[0], values.flat[-1] = top, 0
    return values


def _grey(values, top):
    return np.repeat(values[..., None] * (255 / top), 3, axis=2)


def _over_white(colours, alpha):
    """Colours of 0 to 255 (H, W, 3), with alpha of 0 to 1 (H, W), over white."""
    return colours * alpha[..., None] + 255 * (1 - alpha[..., None])


def _saved(image, format, **rest):
    output = io.BytesIO()
    image.save(output, format, **rest)
    return output.getvalue()


def _png(samples, colour, bits, chunks=()):
    """A PNG of samples (H, W) or (H, W, bands): `colour` is its type 0, 2, 3, 4 or 6, `bits` of each sample."""
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    if bits == 16:
        packed = rows.astype(">u2").view(np.uint8)
    elif bits == 8:
        packed = rows.astype(np.uint8)
    else:
        single = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = np.packbits(single.reshape(height, -1).astype(np.uint8), axis=1)
    body = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def _tiff(samples, order, photometric, form=1, planes=1, extra=None):
    """An uncompressed TIFF of an array (H, W) or (H, W, bands): `order` "<" or ">", `form` 1 unsigned, 2 signed, 3
    floating-point; `planes` 2 stores band after band."""
    height, width = samples.shape[:2]
    bands = samples.shape[2] if samples.ndim == 3 else 1
    body = np.moveaxis(samples, -1, 0) if planes == 2 and bands > 1 else samples
    data = np.ascontiguousarray(body).astype(body.dtype.newbyteorder(order)).tobytes()
    bits, after = samples.dtype.itemsize * 8, []
    tags = {256: [width], 257: [height], 258: [bits] * bands, 259: [1], 262: [photometric], 277: [bands], 278: [height]}
    tags |= {273: [0], 279: [len(data)], 284: [planes], 339: [form] * bands}
    if planes == 2 and bands > 1:
        tags[273], tags[279] = [0] * bands, [len(data) // bands] * bands
    if extra is not None:
        tags[338] = [extra]
    start = 8 + 2 + 12 * len(tags) + 4
    lists = {tag: values for tag, values in tags.items() if len(values) > 1 and tag != 273}
    offset = start + sum(4 * len(values) for values in lists.values()) + (4 * bands if len(tags[273]) > 1 else 0)
    tags[273] = [offset + number * (len(data) // len(tags[273])) for number in range(len(tags[273]))]
    entries = b""
    for tag, values in sorted(tags.items()):
        entries += struct.pack(order + "HHI", tag, 4, len(values))
        if len(values) == 1:
            entries += struct.pack(order + "I", values[0])
        else:
            entries += struct.pack(order + "I", start + sum(map(len, after)))
            after.append(struct.pack(f"{order}{len(values)}I", *values))
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags))
    return head + entries + bytes(4) + b"".join(after) + data


# Kinds: each returns (suffix, content, expected pixels or None[, tolerance[, may_fail]]) ------------------------------


def grey_png(random):
    bits = int(random.choice([1, 2, 4, 8]))
    values = _samples(random, 2**bits - 1)
    expected, chunks = _grey(values, 2**bits - 1), []
    if random.random() < 0.5:
        key = int(random.integers(0, 2**bits))
        chunks, expected = [(b"tRNS", struct.pack(">H", key))], np.where((values == key)[..., None], 255, expected)
    return ".png", _png(values, 0, bits, chunks), expected


def deep_png(random):
    bands, colour = [(0, 0), (3, 2), (2, 4), (4, 6)][random.integers(0, 4)]
    values, chunks = _samples(random, WHITE16, bands), []
    if bands in (2, 4):
        values[..., -1] = _samples(random, WHITE16)
        values.flat[0] = WHITE16
        colours = values[..., :-1] * (255 / WHITE16)
        expected = _over_white(np.broadcast_to(colours, (SIZE, SIZE, 3)), values[..., -1] / WHITE16)
        return ".png", _png(values, colour, 16), expected, 1.5  # colour, alpha and their product are rounded
    expected = _grey(values, WHITE16) if not bands else values * (255 / WHITE16)
    if random.random() < 0.5:
        key = values[3, 4]
        chunks = [(b"tRNS", struct.pack(f">{bands or 1}H", *np.atleast_1d(key).tolist()))]
        hit = values == key if not bands else (values == key).all(2)
        expected = np.where(hit[..., None], 255, expected)
    return ".png", _png(values, colour, 16, chunks), expected


def palette_png(random):
    bits = int(random.choice([1, 2, 4, 8]))
    values, colours = _samples(random, 2**bits - 1), random.integers(0, 256, (2**bits, 3))
    alpha = random.integers(0, 256, random.integers(1, 2**bits + 1))
    full = np.full(2**bits, 255)
    full[: len(alpha)] = alpha
    chunks = [(b"PLTE", colours.astype(np.uint8).tobytes()), (b"tRNS", alpha.astype(np.uint8).tobytes())]
    return ".png", _png(values, 3, bits, chunks), _over_white(colours[values], full[values] / 255), 1.01


def alpha_image(random):
    values = random.integers(0, 256, (SIZE, SIZE, 4)).astype(np.uint8)
    expected = _over_white(values[..., :3], values[..., 3] / 255)
    grey = np.repeat(values[..., :1], 3, axis=2)
    if random.random() < 0.3:
        image, expected = Image.fromarray(values[..., [0, 3]]), _over_white(grey, values[..., 3] / 255)
        return ".png", _saved(image, "PNG"), expected, 1.01
    format = str(random.choice(["PNG", "TIFF", "WEBP", "TGA"]))
    rest = {"lossless": True, "exact": True} if format == "WEBP" else {}
    return f".{format.lower()}", _saved(Image.fromarray(values), format, **rest), expected, 1.01


def colour_image(random):
    """Three bands without loss, of a width or height that is cropped."""
    more = 2 * int(random.integers(0, 20))
    values = random.integers(0, 256, (SIZE, SIZE + more, 3)).astype(np.uint8)
    expected = values[:, more // 2 : more // 2 + SIZE]
    if random.random() < 0.5:
        values, expected = values.swapaxes(0, 1), expected.swapaxes(0, 1)
    format = str(random.choice(["PNG", "TIFF", "BMP", "WEBP", "PPM", "TGA", "PCX", "JPEG2000", "SGI", "QOI"]))
    rest = {"lossless": True} if format == "WEBP" else {"irreversible": False} if format == "JPEG2000" else {}
    suffix = {"JPEG2000": "jp2"}.get(format, format.lower())
    image = Image.fromarray(np.ascontiguousarray(values))
    if format == "TIFF":
        rest["compression"] = random.choice([None, "tiff_lzw", "tiff_deflate", "packbits"])
    if format not in Image.SAVE:  # QOI in older versions of Pillow
        format = "PNG"
    return f".{suffix}", _saved(image, format, **rest), expected


def single_colour(random):
    """Of any size, from one pixel on: resizing changes nothing."""
    size = tuple(random.choice([1, 2, 3, 5, 17, 100, 333], 2).tolist())
    colour = random.integers(0, 256, 3)
    image = Image.new("RGB", size, tuple(colour.tolist()))
    format = str(random.choice(["PNG", "BMP", "TIFF", "PPM", "GIF"]))
    return f".{format.lower()}", _saved(image, format), np.broadcast_to(colour, (SIZE, SIZE, 3)), 1.01


def bilevel(random):
    values = random.integers(0, 2, (SIZE, SIZE)).astype(np.uint8)
    image = Image.fromarray(values * 255).convert("1")
    format = str(random.choice(["PNG", "TIFF", "BMP", "PPM"]))
    rest = {"compression": random.choice([None, "group3", "group4"])} if format == "TIFF" else {}
    return f".{format.lower()}", _saved(image, format, **rest), _grey(values, 1)


def jpeg(random):
    """Grey, colour or CMYK, turned as its EXIF says, with much metadata."""
    steps = np.linspace(0, 200, SIZE)
    values = np.stack([steps[:, None] + 0 * steps, 0 * steps[:, None] + steps, 40 + 0 * np.add.outer(steps, steps)], 2)
    values += random.integers(0, 50)
    orientation, exif = int(random.integers(1, 9)), Image.Exif()
    exif[0x0112] = orientation
    if random.random() < 0.3:
        exif[0x010E] = "x" * int(random.integers(1, 20_000))
    mode, expected = str(random.choice(["L", "RGB", "CMYK"])), values
    image = Image.fromarray(values.round().astype(np.uint8))
    if mode == "L":
        image, expected = Image.fromarray(values[..., 0].round().astype(np.uint8)), values[..., [0, 0, 0]]
    if mode == "CMYK":
        image = Image.merge("CMYK", [Image.fromarray(255 - np.asarray(band)) for band in image.split()] + [
            Image.new("L", image.size)])  # fmt: skip
    content = _saved(
        image, "JPEG", quality=100, subsampling=0, exif=exif, comment=b"c" * int(random.integers(0, 20_000))
    )
    return ".jpg", content, _turned(expected, orientation), JPEG_ERROR


def _turned(pixels, orientation):
    """Pixels (H, W, 3) as EXIF's orientation wants them shown."""
    if orientation in (2, 4, 5, 7):  # stored as in a mirror
        pixels = pixels[:, ::-1]
    return np.rot90(pixels, {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}[orientation])


def turned_deep(random):
    """16 bits and an EXIF orientation."""
    values, orientation, exif = _samples(random, WHITE16).astype(np.uint16), int(random.integers(1, 9)), Image.Exif()
    exif[0x0112] = orientation
    content = _saved(Image.fromarray(values), str(random.choice(["PNG", "TIFF"])), exif=exif)
    return ".png", content, _turned(_grey(values, WHITE16), orientation)


def turned_tiff(random):
    """TIFFs that are wider than high, or the other way round, turned as their orientation says."""
    more, orientation = 2 * int(random.integers(1, 9)), int(random.integers(1, 9))
    shape = (SIZE, SIZE + more) if random.random() < 0.5 else (SIZE + more, SIZE)
    mode, tolerance = str(random.choice(["L", "P", "RGB", "RGBA", "CMYK", "I;16"])), 0.51
    values = random.integers(0, 256, (*shape, 4)).astype(np.uint8)
    if mode in ("L", "P"):
        image, expected = Image.fromarray(values[..., 0].copy()), values[..., [0, 0, 0]]
        if mode == "P":
            colours = random.integers(0, 256, (256, 3)).astype(np.uint8)
            image.putpalette(colours.tobytes())
            expected = colours[values[..., 0]]
    elif mode == "I;16":
        deep = _samples(random, WHITE16, shape=shape)
        image, expected = Image.fromarray(deep.astype(np.uint16)), _grey(deep, WHITE16)
    elif mode == "RGB":
        image, expected = Image.fromarray(values[..., :3].copy()), values[..., :3]
    elif mode == "RGBA":
        image, expected = Image.fromarray(values), _over_white(values[..., :3], values[..., 3] / 255)
        tolerance = 2.01  # Pillow crops it multiplied with alpha
    else:
        image, ink, tolerance = Image.frombytes("CMYK", shape[::-1], values.tobytes()), 255 - values.astype(float), 1.01
        expected = ink[..., :3] * ink[..., 3:] / 255
    compression = random.choice([None, None, "tiff_lzw", "packbits"])
    content = _saved(image, "TIFF", tiffinfo={0x0112: orientation}, compression=compression)
    turned = _turned(expected, orientation)
    top, left = (turned.shape[0] - SIZE) // 2, (turned.shape[1] - SIZE) // 2
    return ".tif", content, turned[top : top + SIZE, left : left + SIZE], tolerance


def palette_gif(random):
    """With a transparent index, and many frames, of which the first counts."""
    values, colours = _samples(random, 7), random.integers(0, 256, (8, 3))
    image = Image.fromarray(values.astype(np.uint8), "L")
    frames = []
    for number in range(int(random.choice([1, 2, 60]))):
        frame = Image.frombytes("P", image.size, ((values + number) % 8).astype(np.uint8).tobytes())
        frame.putpalette(colours.astype(np.uint8).tobytes())
        frames.append(frame)
    key = int(random.integers(0, 8))
    expected = np.where((values == key)[..., None], 255, colours[values])
    content = _saved(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=key, optimize=False)
    return ".gif", content, expected


def many_frames(random):
    """Of PNG, TIFF and WebP, too, the first frame counts."""
    values = random.integers(0, 256, (int(random.choice([2, 5, 40])), SIZE, SIZE, 3)).astype(np.uint8)
    frames = [Image.fromarray(each) for each in values]
    format = str(random.choice(["PNG", "TIFF", "WEBP"]))
    rest = {"lossless": True} if format == "WEBP" else {}
    return f".{format.lower()}", _saved(frames[0], format, save_all=True, append_images=frames[1:], **rest), values[0]


def tiff_numbers(random):
    """Every kind of sample, in both byte orders, black or white being zero."""
    order, inverted = str(random.choice(["<", ">"])), random.random() < 0.3
    kind = str(random.choice(["u1", "u2", "i2", "u4", "i4", "f4"]))
    if kind == "f4":
        values, low, high = random.random((SIZE, SIZE)).astype("f4"), 0, 1
    else:
        low, high = {"u1": (0, 255), "u2": (0, WHITE16), "i2": SIGNED}.get(kind, WIDE)
        values = (_samples(random, high - low) + low).astype(kind)
    photometric = 0 if inverted and kind in ("u1", "u2", "f4") else 1
    expected = (values.astype(np.float64) - low) * (255 / (high - low))
    expected = np.repeat((255 - expected if photometric == 0 else expected)[..., None], 3, axis=2)
    form = {"u": 1, "i": 2, "f": 3}[kind[0]]
    is_rare = order == ">" and (kind == "u4" or (kind == "u2" and photometric == 0))
    return ".tif", _tiff(values, order, photometric, form), expected, 0.51, is_rare


def tiff_colours(random):
    """16 bits of colour, with transparency, an unused band or none; 8 bits in planes."""
    if random.random() < 0.3:
        values = random.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
        return ".tif", _tiff(values, str(random.choice(["<", ">"])), 2, planes=2), values
    bands, extra = [(3, None), (4, 0), (4, 2)][random.integers(0, 3)]
    values = _samples(random, WHITE16, bands).astype(np.uint16)
    expected = values[..., :3] * (255 / WHITE16)
    if extra == 2:
        expected = _over_white(expected, values[..., 3] / WHITE16)
    return ".tif", _tiff(values, str(random.choice(["<", ">"])), 2, extra=extra), expected, 1.5


def tiff_refused(random):
    """What Pillow would misread: signed bytes, 16 bits in planes, and values that are no numbers."""
    order = str(random.choice(["<", ">"]))
    kind = random.integers(0, 4)
    if kind == 0:
        return ".tif", _tiff(random.integers(-128, 128, (SIZE, SIZE)).astype("i1"), order, 1, 2), None
    if kind == 1:
        return ".tif", _tiff(_samples(random, WHITE16, 3).astype(np.uint16), order, 2, planes=2), None
    if kind == 2:  # multiplied with alpha, of which Pillow undoes only the upper half
        return ".tif", _tiff(_samples(random, WHITE16, 4).astype(np.uint16), order, 2, extra=1), None
    values = random.random((SIZE, SIZE)).astype("f4")
    values[random.integers(0, SIZE), random.integers(0, SIZE)] = random.choice([np.nan, np.inf, -np.inf])
    return ".tif", _tiff(values, order, 1, 3), None


def print_colours(random):
    """CMYK without loss."""
    values = random.integers(0, 256, (SIZE, SIZE, 4)).astype(np.uint8)
    ink = 255 - values.astype(float)
    image = Image.merge("CMYK", [Image.fromarray(np.ascontiguousarray(values[..., band])) for band in range(4)])
    return ".tif", _saved(image, "TIFF"), ink[..., :3] * ink[..., 3:] / 255, 1.01


def portable(random):
    """PGM and PPM of any largest value, as bytes or as text, and PFM."""
    if random.random() < 0.2:
        values, order = random.random((SIZE, SIZE)).astype("f4"), random.choice(["<", ">"])
        scale = {"<": "-1.0", ">": "1.0"}[order]
        head = f"Pf\n{SIZE} {SIZE}\n{scale}\n".encode()
        return ".pfm", head + values[::-1].astype(f"{order}f4").tobytes(), _grey(values, 1)
    top, bands = int(random.choice([1, 7, 100, 255, 1000, 4095, 65535])), int(random.choice([0, 3]))
    values, plain = _samples(random, top, bands), random.random() < 0.5
    number = (3 if bands else 2) if plain else (6 if bands else 5)
    head = f"P{number}\n# a comment\n{SIZE} {SIZE}\n{top}\n".encode()
    body = " ".join(map(str, values.ravel().tolist())).encode() if plain else b""
    if not plain:
        body = values.astype(">u2" if top > 255 else "u1").tobytes()
    return ".ppm", head + body, values * (255 / top) if bands else _grey(values, top), 1.01


def much_metadata(random):
    """Megabytes that are no pixels."""
    values = random.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    extra = random.integers(0, 256, int(random.integers(100_000, 3_000_000)), np.uint8).tobytes()
    chunks = [(b"tEXt", b"Comment\0" + extra), (b"prVt", extra), (b"eXIf", extra[:1000])]
    chunks.append((b"iCCP", b"profile\0\0" + zlib.compress(extra, 1)))
    return ".png", _png(values, 2, 8, [chunks[random.integers(0, len(chunks))]]), values


def no_image(random):
    texts = (b"", b"\0", b"<!DOCTYPE html><title>404</title>", b"PK\3\4", b"%PDF-1.7\n", b"GIF89a", b"\xff\xd8\xff",
             b"\x89PNG\r\n\x1a\n", b"II*\0\x08\0\0\0", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
             b"\0\0\0\x18ftypheic", b"BM", b"RIFF\0\0\0\0WEBP", b"P6\n16 16\n", b"SIMPLE  =    T")  # fmt: skip
    content = texts[random.integers(0, len(texts))]
    if random.random() < 0.3:
        content += random.integers(0, 256, random.integers(1, 500), np.uint8).tobytes()
    return str(random.choice([".png", ".jpg", ".tiff", ".webp"])), content, None


KINDS = (
    grey_png, deep_png, palette_png, alpha_image, colour_image, single_colour, bilevel, jpeg, turned_deep, turned_tiff,
    palette_gif, many_frames, tiff_numbers, tiff_colours, tiff_refused, print_colours, portable, much_metadata,
    no_image,
)  # fmt: skip
