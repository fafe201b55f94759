"""Reading pictures: any common file to 8-bit RGB, in bounded memory, with one error for everything that is none."""

from __future__ import annotations

import io
import os
import re
import warnings
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image, JpegImagePlugin

from mmm_export.errors import ImageError

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | BinaryIO"

# Also Pillow's own limit. Reading takes 4 bytes a pixel, twice while colours are converted: 0.7 GB at most.
MAX_PIXELS = 89_478_485
# The longest side a JPEG can have. Resizing a longer one would need tables of gigabytes however few pixels there are.
MAX_SIDE = 65_535

# Formats that Pillow knows by their first bytes and decodes by itself: TGA takes random bytes for a picture, EPS runs a
# program.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_JPEG_START = b"\xff\xd8\xff"
_JPEG_FRACTIONS = (2, 4, 8)  # libjpeg can decode at 1/2, 1/4 or 1/8 of the size
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")


def load_image(source: ImageSource) -> Image.Image:
    """Read a picture as 8-bit RGB, the way the reference's `convert("RGB")` does.

    Transparency is dropped: a transparent pixel shows the colour stored under it. Of an animation the first frame is
    read. The camera's orientation tag is not applied. 16-bit greys are scaled to 8 bits (the reference clips them to
    white). A baseline JPEG file of more than MAX_PIXELS is decoded at 1/2, 1/4 or 1/8 of its size.

    Args:
        source: a path, the content of a file, an open file, or a picture already read (which is not changed).

    Raises:
        ImageError: no such file, no picture, a truncated one, or one above MAX_PIXELS or with a side above MAX_SIDE.

    """
    name = _name(source)
    if isinstance(source, Image.Image):
        return _rgb(source, name)
    if isinstance(source, bytes):
        return _decoded(io.BytesIO(source), name)
    if not isinstance(source, (str, os.PathLike)):
        return _decoded(source, name)
    path = Path(source)
    if not path.is_file():
        raise ImageError(
            f"{name} cannot be read",
            found="a folder or device" if path.exists() else "no such file",
            wanted="an image file",
        )
    try:
        with path.open("rb") as stream:
            return _decoded(stream, name)
    except OSError as error:
        raise ImageError(f"{name} cannot be read", found=str(error), wanted="an image file") from error


def _name(source: ImageSource) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, bytes):
        return f"an image of {len(source)} bytes"
    name = getattr(source, "filename" if isinstance(source, Image.Image) else "name", "")
    return name if isinstance(name, str) and name else "an image"


def _decoded(stream: BinaryIO, name: str) -> Image.Image:
    start = b""
    try:
        start = stream.read(16)
        stream.seek(0)
        image = _opened(stream, start)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))  # Pillow says how many, and then talks of its own limit
        raise _too_large(name, f"{pixels[0]} pixels" if pixels else "a picture of another order") from error
    except Exception as error:  # a damaged header ends in any of a dozen exception types
        raise ImageError(
            f"{name} is no image that can be read",
            found=f"a file that starts with {start!r}" if start else "an empty file",
            wanted="PNG, JPEG, WebP, GIF, BMP, TIFF or another common image format",
            hint="check the path, or convert the picture to PNG",
        ) from error
    with image:
        _shrink(image)
        return _rgb(image, name)


def _opened(stream: BinaryIO, start: bytes) -> Image.Image:
    if start.startswith(_JPEG_START):
        # Past Image.open, which refuses by size before draft mode can shrink the picture; the limit is checked later.
        return JpegImagePlugin.JpegImageFile(stream)
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures: they are refused below; of odd metadata: it is not used
        return Image.open(stream, formats=[name for name in _FORMATS if name in Image.OPEN])


def _rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels", found=f"{width} x {height} pixels", wanted="at least 1 x 1")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_large(name, f"{width} x {height} pixels")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of palettes with transparency, which is dropped on purpose
            return _eight_bit(image, name).convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # as in _decoded: damaged data ends in many exception types
        raise ImageError(
            f"{name} cannot be decoded",
            found=f"{image.format or 'picture'} of {width} x {height} pixels, mode {image.mode}: {error}",
            wanted="a complete image file that converts to RGB",
        ) from error


def _shrink(image: Image.Image) -> None:
    """Update a JPEG above the limit to decode at the largest fraction of its size that is under it."""
    width, height = image.size
    # A progressive JPEG keeps the coefficients of the full size in memory, whatever is decoded of them.
    if width * height <= MAX_PIXELS or image.format != "JPEG" or image.info.get("progressive"):
        return
    for factor in _JPEG_FRACTIONS:
        if -(-width // factor) * -(-height // factor) <= MAX_PIXELS:
            image.draft("RGB", (width // factor, height // factor))
            return


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Scale greys of more than 8 bits to 8 bits; other pictures come back as they are."""
    if image.mode not in (*_SIXTEEN_BIT, "I", "F"):
        return image
    values = np.asarray(image)
    low, high = (values.min(), values.max()) if image.mode != "F" else (-1, -1)
    if low < 0 or high > 65535:
        raise ImageError(
            f"{name} has pixels without a known range",
            found="floating-point pixels" if image.mode == "F" else f"values from {low} to {high}",
            wanted="8 or 16 bits a pixel",
            hint="save the image with 8 bits a pixel",
        )
    table = ((np.arange(65536) + 128) // 257).astype(np.uint8)
    greys = np.empty(values.shape, np.uint8)
    for row, out in zip(values, greys, strict=True):  # by rows: an index takes 8 bytes a pixel
        np.take(table, row, out=out)
    return Image.fromarray(greys)


def _too_large(name: str, found: str) -> ImageError:
    return ImageError(
        f"{name} is too large",
        found=found,
        wanted=f"at most {MAX_PIXELS} pixels, and {MAX_SIDE} along a side",
        hint="scale the image down first; the model sees tiles of a few hundred pixels",
    )
