"""Reading pictures: every mode and format as the reference sees it, and one ImageError for everything else."""

from __future__ import annotations

import io
import resource
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmm_export.errors import ImageError
from mmm_export.images import MAX_PIXELS, load_image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pattern(mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> Image.Image:
    values = np.arange(size[0] * size[1] * 4, dtype=np.uint32).reshape(size[1], size[0], 4) * 37 % 256
    return Image.fromarray(values.astype(np.uint8)).convert(mode)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_modes_are_converted_as_the_reference_does(mode: str, kind: str) -> None:
    content = encoded(pattern(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    image = load_image(content)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "PPM", "JPEG2000"])
def test_common_formats_are_read(kind: str) -> None:
    assert load_image(encoded(pattern(), kind)).size == (9, 7)


def test_cmyk_jpeg_becomes_rgb() -> None:
    content = encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = load_image(content).getpixel((1, 1))  # type: ignore[misc]
    # Pure magenta and yellow ink is red; JPEG may be off by a few levels.
    assert red > 245
    assert max(green, blue) < 10


def test_transparent_pixel_shows_its_stored_colour() -> None:
    content = encoded(Image.new("RGBA", (2, 2), (10, 200, 30, 0)))
    assert load_image(content).getpixel((0, 0)) == (10, 200, 30)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_greys_are_scaled_and_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    image = load_image(encoded(Image.fromarray(values), kind))
    # The nearest of 256 levels, 257 apart: 128 is nearer to 0, 129 to 257.
    np.testing.assert_array_equal(np.asarray(image)[0, :, 0], [0, 0, 1, 1, 128, 255])


def test_pixels_without_a_known_range_are_refused() -> None:
    for values in (np.array([[0.5]], np.float32), np.array([[70000]], np.int32), np.array([[-1]], np.int32)):
        with pytest.raises(ImageError, match="without a known range"):
            load_image(encoded(Image.fromarray(values), "TIFF"))


def test_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert load_image(content).getpixel((1, 1)) == (255, 0, 0), kind


def test_camera_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    assert load_image(encoded(pattern(size=(9, 7)), "JPEG", exif=exif)).size == (9, 7)


def test_single_pixel_is_a_picture() -> None:
    assert load_image(encoded(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_path_bytes_open_file_and_picture_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(pattern()))
    expected = load_image(path).tobytes()
    with path.open("rb") as stream:
        stream.read(3)  # where an open file stands does not matter
        assert load_image(stream).tobytes() == expected
        assert not stream.closed
    assert load_image(str(path)).tobytes() == expected
    assert load_image(path.read_bytes()).tobytes() == expected
    given_image = pattern("P")
    assert load_image(given_image).tobytes() == given_image.convert("RGB").tobytes()
    assert given_image.mode == "P"


def test_truncated_file_is_refused_with_its_name_and_format(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        path = tmp_path / f"cut.{kind}"
        content = encoded(pattern(size=(64, 64)), kind)
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ImageError) as caught:
            load_image(path)
        assert str(path) in caught.value.what
        assert kind in str(caught.value) or kind == "WEBP"  # a cut WebP is not even recognised


@pytest.mark.parametrize("content", [b"", b"not an image", b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff"])
def test_file_that_is_no_picture_is_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match="no image that can be read") as caught:
        load_image(content)
    assert str(content[:6])[2:-1] in str(caught.value.found) or not content


def test_missing_file_and_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="nowhere") as caught:
        load_image(tmp_path / "nowhere.png")
    assert caught.value.found == "no such file"
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path)
    assert caught.value.found == "a folder or device"


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (9460, 9460), (2**31 - 1, 2**31 - 1), (70_000, 1)])
def test_picture_above_the_limit_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="too large") as caught:
            load_image(png_header(width, height))
    assert str(MAX_PIXELS) in str(caught.value.wanted)
    # Decoding the smallest of them would take 268 MB; ru_maxrss is in KiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_large_baseline_jpeg_is_decoded_at_a_fraction_of_its_size() -> None:
    content = encoded(Image.new("L", (12_000, 8000), 90), "JPEG")
    image = load_image(content)
    assert image.size == (6000, 4000)
    assert image.getpixel((17, 17)) == (90, 90, 90)


def test_large_progressive_jpeg_is_refused() -> None:
    content = bytearray(encoded(Image.new("L", (16, 16)), "JPEG", progressive=True))
    frame = content.index(b"\xff\xc2")
    content[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 20_000)
    with pytest.raises(ImageError, match="too large"):
        load_image(bytes(content))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_picture_given_above_the_limit_is_refused_and_left_alone() -> None:
    large = Image.open(io.BytesIO(encoded(Image.new("L", (9500, 9500)), "JPEG")))
    with pytest.raises(ImageError, match="too large"):
        load_image(large)
    assert large.size == (9500, 9500)


SEEDS = [encoded(pattern(size=(16, 12)), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")]


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused_or_read(content: bytes) -> None:
    _read_or_refuse(content)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), seed=st.sampled_from(SEEDS))
def test_damaged_pictures_are_refused_or_read(data: st.DataObject, seed: bytes) -> None:
    content = bytearray(seed)
    # Half of the changes hit the header, where sizes and kinds stand.
    places = st.integers(0, 63) | st.integers(0, len(content) - 1)
    for position, value in data.draw(st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=5)):
        content[position % len(content)] ^= value
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    _read_or_refuse(bytes(content))


def _read_or_refuse(content: bytes) -> None:
    try:
        image = load_image(content)
    except ImageError:
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= MAX_PIXELS
