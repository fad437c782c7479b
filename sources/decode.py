"""One image file becomes pixels, whatever its samples are: 8 bits, 16 or 32, or floating-point numbers."""

import contextlib
import errno
import functools
import importlib
import re
import sys
import warnings
from dataclasses import dataclass

import numpy as np
import PIL
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from runs.files import Damaged, Failure, first_line, reason
from sources import one_line
from sources.ranges import ALPHA, DOCUMENTED, out_of_range

DECODER_VERSION = 4  # of `decode`: raise it with any change of what it returns
NO_FAULT = {  # of a file that cannot be read: it is whole, and to leave it out would be wrong
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
MAX_PIXELS = 100_000_000  # Pillow refuses images of more than twice as many
MAX_TEXT = 16 << 20  # bytes of a PNG's colour profile or of one of its texts; Pillow refuses a whole image for more
ROWS = 256  # of an image that are scaled at a time, so that no wide copy of all is held

# Formats that Pillow only identifies; EPS, which it hands to Ghostscript to run; FITS, whose scale it ignores.
NOT_DECODED = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}

ORIENTATION = 0x0112  # in EXIF; how an image is turned by each
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), 2))  # fmt: skip
BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339  # in TIFF
WIDE = re.compile(r"(LA|RGB|RGBA|RGBX|RGBa|CMYK|L);16([BLN])$")  # Pillow's names of 16-bit layouts it cuts to 8 bits
PACKED = {"L;2": 85, "L;4": 17}  # its names of grey samples of 2 and 4 bits, and what it multiplies them with


BEGINNINGS = {
    b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"RIFF": "WebP", b"BM": "BMP",
    b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF",
}  # fmt: skip


class NotDecoded(Damaged):
    """An image file that cannot be decoded; `why` is its text without the path, `lasting` whether the content of the
    file is at fault, so that it stays so."""

    def __init__(self, path, why, lasting=True):
        super().__init__(f"{one_line(str(path))} {why}")
        self.why, self.lasting = why, lasting


@dataclass(frozen=True)
class Decoded:
    """`pixels` are uint8 (S, S, 3), or None where the range of one of its kinds of `samples` is not known yet; `size`
    is the file's own, (width, height); `samples` are those that need a range, as (kind, least, greatest)."""

    pixels: np.ndarray | None
    size: tuple[int, int]
    samples: tuple[tuple[str, float, float], ...] = ()


@functools.cache
def image_formats():
    """(the formats that are decoded, their file name suffixes), with Pillow set up for large images, and for HEIF where
    pillow-heif is installed."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_TEXT
    warnings.filterwarnings("ignore", module="PIL")  # of odd metadata, and of images up to twice as large
    with contextlib.suppress(ImportError):  # without it .heic files are passed over, which is said
        importlib.import_module("pillow_heif").register_heif_opener()
    suffixes = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    formats = sorted(set(suffixes.values()) - NOT_DECODED)
    return formats, frozenset(suffix for suffix, kind in suffixes.items() if kind in formats)


def reader():
    """The versions of what reads image files: another one may read what this one cannot."""
    heif = sys.modules.get("pillow_heif") if image_formats() else None
    return f"Pillow {PIL.__version__}" + (f", pillow-heif {heif.__version__}" if heif else "")


def read_image(path, image_size, ranges=None):
    """One image of any size and mode -> uint8 array (image_size, image_size, 3).

    EXIF orientation is applied, transparency laid over white; the image is resized so that it covers the square, and
    centre-cropped. Samples of more than 8 bits are scaled by `ranges`, {kind: (black, white)}, as a model has them in
    its `ranges`, or else from 0 to 65,535 (16 bits) and from 0 to 1 (floating-point). Raises Damaged with the path
    where the image cannot be decoded, or holds samples outside of such a range, so that another one must be meant; a
    range from the least to the greatest sample of a data set clips what is darker or brighter.
    """
    ranges = DOCUMENTED | (ranges or {})
    decoded = decode(path, image_size, ranges)
    if decoded.pixels is None:
        raise no_range(path, decoded)
    return decoded.pixels


def no_range(path, decoded):
    """The NotDecoded of an image whose samples have no range; `decoded` is its Decoded."""
    kind = decoded.samples[0][0]
    return NotDecoded(path, f"cannot be decoded as an image: its samples are {kind}, and no range is known for them.")


def no_memory(path):
    """The Failure of an image that there is not enough memory for, which says nothing about the file."""
    return Failure(
        f"there is not enough memory to decode {path}. Fewer --num-workers need less; or make that image smaller."
    )


def decode(path, image_size, ranges):
    """The Decoded of a file, without pixels where the range of a kind of its samples is not in `ranges`. Raises
    NotDecoded, or Failure where not the file is at fault."""
    formats, _ = image_formats()
    try:
        # Opened here: of a path Pillow maps raw TIFFs into memory, and scrambles those that EXIF turns.
        with open(path, "rb") as file, Image.open(file, formats=formats) as image:
            size, layout = image.size, _layout(image)
            if layout in PACKED and "transparency" in image.info:  # Pillow does not scale the transparent grey along
                image.info["transparency"] *= PACKED[layout]
            image.draft(None, (2 * image_size, 2 * image_size))  # JPEG: decodes to an eighth of the size and up
            image.load()
            orientation = _orientation(image)
            deep, samples = _deep(image, layout, path), ()
            if deep:
                samples = deep.samples()
                if any(kind not in ranges for kind, _, _ in samples):
                    return Decoded(None, size, samples)
                image = deep.as_8_bits(ranges)
            if orientation in TURNS:
                image = image.transpose(TURNS[orientation])
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
            if image.size != (image_size, image_size):
                image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
            if image.mode == "RGBA":
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return Decoded(np.array(image), size, samples)
    except UnidentifiedImageError:
        raise NotDecoded(path, f"cannot be decoded: {_unknown(path)}.") from None
    except MemoryError:
        raise no_memory(path) from None
    except Exception as error:  # Pillow's plugins raise nearly every kind of exception on a damaged file
        if getattr(error, "errno", None):
            if error.errno in NO_FAULT:
                raise Failure(f"cannot read {path}: {reason(error)}.") from None
            raise NotDecoded(path, f"cannot be read: {reason(error)}.", lasting=False) from None
        if "out of memory" in str(error):  # Pillow's decoders, without a number
            raise no_memory(path) from None
        raise NotDecoded(path, f"cannot be decoded as an image: {first_line(error)}.") from error


def _unknown(path):
    """Why Pillow knows no way to open a file that it could read."""
    with open(path, "rb") as file:
        start = file.read(12)
    if not start:
        return "the file is empty"
    if start[4:8] == b"ftyp":
        advice = "" if "HEIF" in image_formats()[0] else " (pip install pillow-heif to read HEIC)"
        return f"it is a HEIF or AVIF image that cannot be read here{advice}"
    name = next((name for beginning, name in BEGINNINGS.items() if start.startswith(beginning)), None)
    return f"it begins as a {name} file, but Pillow cannot read it" if name else "it is not an image of a known format"


def _orientation(image):
    """The orientation that a loaded image's EXIF names, or None; also where that is damaged, as viewers take it."""
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # Pillow raises many kinds, SyntaxError and struct.error among them
        return None


# Samples of more than 8 bits ------------------------------------------------------------------------------------------


@dataclass
class _Deep:
    """Samples of more than 8 bits: `bands` are arrays (H, W) of a Pillow `mode` L, RGB or CMYK, `alpha` one of samples
    or, where some colour is transparent, of booleans, or None; `declared` is the (black, white) that the file itself
    declares, or None."""

    kind: str
    bands: list[np.ndarray]
    mode: str = "L"
    alpha: np.ndarray | None = None
    declared: tuple[float, float] | None = None
    inverted: bool = False  # white is the lowest

    def extremes(self):
        """The least and greatest sample, as numbers that JSON can hold; raises ValueError where one is not finite."""
        low, high = min(band.min() for band in self.bands).item(), max(band.max() for band in self.bands).item()
        if not np.isfinite([low, high]).all():
            raise ValueError("it holds samples that are not finite")
        return low, high

    def samples(self):
        """Those that need a range, as (kind, least, greatest)."""
        found = [(self.kind, *self.extremes())] if self.declared is None else []
        if self.alpha is not None and self.alpha.dtype != bool:
            found.append((ALPHA, self.alpha.min().item(), self.alpha.max().item()))
        return tuple(found)

    def as_8_bits(self, ranges):
        """A Pillow image of 8 bits, scaled by `ranges`; raises ValueError where samples lie outside of a usual one."""
        if why := out_of_range(self.samples(), ranges):
            raise ValueError(why)
        black, white = self.declared or ranges[self.kind]
        bands = [_scaled(band, black, white) for band in self.bands]
        if self.inverted:
            bands = [255 - band for band in bands]
        mode = self.mode
        if self.alpha is not None:
            bands.append(_scaled(self.alpha, *(ranges[ALPHA] if self.alpha.dtype != bool else (0, 1))))
            mode += "A"
        return Image.merge(mode, [Image.fromarray(band) for band in bands])


def _scaled(band, black, white):
    """The samples (H, W) as uint8: `black` and less become 0, `white` and more 255."""
    result, factor = np.empty(band.shape, np.uint8), 255 / ((white - black) or 1)
    for start in range(0, len(band), ROWS):
        part = band[start : start + ROWS].astype(np.float64)
        result[start : start + ROWS] = np.rint((part - black) * factor).clip(0, 255)
    return result


def _layout(image):
    """Pillow's name of how samples lie in the file, such as "RGB;16B", where it has one. Asked before the image is
    loaded. Raises ValueError for layouts that Pillow misreads."""
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(BITS, (8,)))
    if bits == 8 and 2 in tags.get(SAMPLE_FORMAT, ()):
        raise ValueError("its samples are signed 8-bit numbers, which Pillow takes for unsigned ones")
    if bits > 8 and tags.get(PLANAR) == 2:
        raise ValueError(f"its {bits}-bit samples lie in planes, which Pillow misreads: export it in another layout")
    given = image.tile[0][3] if image.tile else ""
    layout = next(iter(given), "") if isinstance(given, tuple | list) else given
    layout = layout if isinstance(layout, str) else ""
    if WIDE.match(layout) and (image.format not in ("PNG", "TIFF") or layout.startswith(("RGBa", "L;"))):
        raise ValueError(
            "of its 16-bit samples Pillow reads the upper half only: export it as PNG, or as TIFF without "
            "premultiplied transparency"
        )
    return layout


def _deep(image, layout, path):
    """The _Deep of a loaded image, or None where its samples have 8 bits or fewer; `layout` as from `_layout`."""
    tags = getattr(image, "tag_v2", {})
    inverted = tags.get(PHOTOMETRIC) == 0
    if image.mode == "F":
        return _Deep("floating-point", [np.asarray(image)], inverted=inverted)
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):  # I, I;16, I;16B
        values, kind, declared = np.asarray(image), "16-bit" if ";16" in image.mode else "32-bit", None
        if tags:
            bits, form = tags.get(BITS, (1,))[0], tags.get(SAMPLE_FORMAT, (1,))[0]
            kind = f"{'signed ' * (form == 2)}{bits}-bit"
            if kind == "32-bit":
                values = values.view(np.uint32)
            if bits < 16:
                declared = (0, 2**bits - 1)
        elif image.format in ("JPEG2000", "PPM"):  # these declare it, and Pillow has scaled to 16 bits
            declared = (0, 65535)
        alpha = None if transparent is None else values != transparent
        return _Deep(kind, [values], "L", alpha, declared, inverted)
    if not WIDE.match(layout):
        return None
    if layout.startswith("LA"):
        halves = np.asarray(_loaded_as(path, "RGBA")).astype(np.uint16)  # four bytes a pixel: both halves of both
        grey, alpha = ((halves[..., band] << 8) | halves[..., band + 1] for band in (0, 2))
        return _Deep("16-bit", [grey], "L", alpha)
    suffix = layout[-1] if layout[-1] != "N" else sys.byteorder[0].upper()
    lower = _loaded_as(path, layout[:-1] + {"B": "L", "L": "B"}[suffix])  # Pillow keeps one byte of each two
    values = (np.asarray(image).astype(np.uint16) << 8) | np.asarray(lower)
    bands = [values[..., number] for number in range(values.shape[2])]
    alpha = bands.pop() if image.mode == "RGBA" else None
    if transparent is not None:
        alpha = (values != transparent).any(2)
    return _Deep("16-bit", bands, image.mode[:4].removesuffix("A"), alpha)


def _loaded_as(path, layout):
    """The image loaded once more, as if its samples had another of Pillow's layouts with as many bytes."""
    with open(path, "rb") as file, Image.open(file, formats=["PNG", "TIFF"]) as image:
        image.tile = [
            type(tile)(*tile[:3], layout if isinstance(tile[3], str) else (layout, *tile[3][1:])) for tile in image.tile
        ]
        image.load()
        return image.copy()
