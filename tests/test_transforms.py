"""Decoding is safe and gives the documented RGB; squares and floats are exact."""

import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from t2i_jax.data import transforms


def encode(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def chunk(kind, body):
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(w, h, *, bits, colour, pixels, before=()):
    """A PNG by hand: colour 0 grey, 2 RGB, 3 palette, 4 grey + alpha, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, 0))
    body = b"".join(before) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def pixel(bits, colour, pixels, *before):
    return png(1, 1, bits=bits, colour=colour, pixels=b"\0" + pixels, before=before)


PALETTE = chunk(b"PLTE", bytes([1, 2, 3, 200, 100, 50]))
TRANSPARENT = lambda *values: chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (pixel(8, 2, bytes([7, 8, 9])), (7, 8, 9)),
        (pixel(8, 0, bytes([64])), (64, 64, 64)),
        (pixel(1, 0, b"\x80"), (255, 255, 255)),
        (pixel(2, 0, b"\x80"), (170, 170, 170)),
        (pixel(16, 0, b"\x80\xff"), (128, 128, 128)),
        (pixel(16, 0, b"\0\xff"), (1, 1, 1)),
        (pixel(16, 0, b"\xff\xff"), (255, 255, 255)),
        (pixel(16, 2, b"\x80\xff\x10\xff\xff\0"), (128, 16, 255)),
        (pixel(16, 6, b"\x80\0\x10\0\xff\0\xff\xff"), (128, 16, 255)),
        (pixel(16, 4, b"\0\0\x80\0"), (127, 127, 127)),  # half black over white
        (pixel(8, 4, bytes([0, 128])), (127, 127, 127)),
        (pixel(8, 6, bytes([255, 0, 0, 0])), (255, 255, 255)),
        (pixel(8, 6, bytes([200, 100, 50, 128])), (227, 177, 152)),
        (pixel(8, 3, b"\1", PALETTE), (200, 100, 50)),
        (pixel(8, 3, b"\1", PALETTE, chunk(b"tRNS", b"\xff\x80")), (227, 177, 152)),
        (pixel(8, 0, b"\x40", TRANSPARENT(0x40)), (255, 255, 255)),
        (pixel(8, 2, b"\1\2\3", TRANSPARENT(1, 2, 3)), (255, 255, 255)),
        (pixel(8, 2, b"\1\2\3", TRANSPARENT(1, 2, 4)), (1, 2, 3)),
        (pixel(1, 0, b"\0", TRANSPARENT(0)), (255, 255, 255)),
        (encode(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
        (encode(Image.new("L", (1, 1), 77), "JPEG"), (77, 77, 77)),
        (encode(Image.new("RGB", (1, 1), (9, 8, 7)), "WEBP", lossless=True), (9, 8, 7)),
        (encode(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "WEBP", lossless=True), (127,) * 3),
    ],
)  # fmt: skip
def test_odd_pictures_become_the_documented_rgb(data, wanted):
    image_HWC = transforms.decode(data)
    assert (image_HWC.shape, image_HWC.dtype) == ((1, 1, 3), np.uint8)
    assert tuple(image_HWC[0, 0].tolist()) == wanted


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_upright(orientation, kind):
    """EXIF 2.3, orientation: where the stored picture's first row and column belong."""
    upright = np.zeros((32, 16, 3), np.uint8)
    upright[:16, :8] = upright[16:, 8:] = upright[:16, 8:, 0] = 255  # no two turns look alike
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(stored), kind, exif=exif, quality=95)
    got = transforms.decode(data)
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).mean() < 20


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in (40, 90, 140)]
    for kind in ("PNG", "WEBP"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert transforms.decode(data)[0, 0].tolist() == [40, 0, 0]


def test_a_colour_profile_changes_nothing():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain = Image.fromarray(noise(4, 4))
    for kind in ("PNG", "WEBP"):
        got = transforms.decode(encode(plain, kind, icc_profile=profile, lossless=True))
        np.testing.assert_array_equal(got, np.asarray(plain))


GOOD = encode(Image.fromarray(noise(32, 32)))
FLOOD = zlib.compress(b"a" * 50_000_000)
BOMBS = {
    "50,000 pixels a side": png(50_000, 50_000, bits=1, colour=0, pixels=b"\0"),
    "9,000 pixels a side": png(9000, 9000, bits=1, colour=0, pixels=b"\0" * 1126 * 9000),
    "a long strip": png(1, 30_000, bits=1, colour=0, pixels=b"\0" * 60_000),
    "a huge JPEG": encode(Image.new("L", (8, 8)), "JPEG").replace(
        b"\x08\0\x08\0\x08\x01", b"\x08\xff\xff\xff\xff\x01"
    ),
    "a text that unpacks to 50 MB": pixel(8, 0, b"\0", chunk(b"zTXt", b"a\0\0" + FLOOD)),
    "a profile that unpacks to 50 MB": pixel(8, 0, b"\0", chunk(b"iCCP", b"a\0\0" + FLOOD)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_from_the_header(name):
    with pytest.raises(transforms.BadExample):  # once, for what Pillow imports
        transforms.decode(BOMBS[name])
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(transforms.BadExample):
        transforms.decode(BOMBS[name])
    assert time.perf_counter() - started < 0.1
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>", "unreadable as PNG, JPEG or WebP"),
        (b"\x80\x04\x95cos\nsystem\n", "unreadable"),
        (GOOD[:20], "broken picture"),
        (GOOD[: len(GOOD) // 2], "broken picture"),
        (encode(Image.fromarray(noise(32, 32)), "JPEG")[:-300], "broken picture"),
        (encode(Image.fromarray(noise(32, 32)), "WEBP")[:-300], "broken picture"),
        (GOOD.replace(b"IDAT", b"IDBT"), "unreadable"),
        (BOMBS["50,000 pixels a side"], "too many pixels"),
        *((encode(Image.new("RGB", (4, 4)), k), "unreadable")
          for k in ("GIF", "TIFF", "BMP", "PDF", "EPS", "PPM", "ICO")),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unreadable"),
        (b"SIMPLE  =                    T", "unreadable"),  # FITS
    ],
)  # fmt: skip
def test_what_is_no_sound_picture_is_a_bad_example_with_a_kind(data, kind):
    with pytest.raises(transforms.BadExample, match=f"^{kind}"):
        transforms.decode(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_never_do_worse_than_bad_example():
    rng = np.random.default_rng(0)
    plain = Image.fromarray(noise(24, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = encode(plain, kind, exif=exif)
        for _ in range(100):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), rng.integers(1, 8)):
                data[place] = rng.integers(256)
            try:
                image_HWC = transforms.decode(bytes(data[: rng.integers(8, 2 * len(data))]))
            except transforms.BadExample:
                continue
            assert image_HWC.ndim == 3
            assert image_HWC.shape[2] == 3


def test_a_large_photograph_is_decoded_small_to_the_same_picture():
    y, x = np.mgrid[:800, :1200]
    photo = np.stack([127 + 120 * np.sin(x / 90), 127 + 120 * np.cos(y / 70), (x + y) / 8], -1)
    data = encode(Image.fromarray(photo.astype(np.uint8)), "JPEG", quality=95)
    assert transforms.decode(data).shape == (800, 1200, 3)
    small = transforms.decode(data, 48)
    assert small.shape == (100, 150, 3)  # an eighth; the sides stay above 96
    assert transforms.decode(data, 60).shape == (200, 300, 3)
    exact = transforms.square(transforms.decode(data), 48)
    assert np.abs(transforms.square(small, 48).astype(int) - exact).mean() < 1


def test_square_takes_the_middle():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = noise(10, 10)
    np.testing.assert_array_equal(transforms.square(wide, 10), wide[:, 10:20])
    np.testing.assert_array_equal(
        transforms.square(wide.transpose(1, 0, 2), 10), wide[:, 10:20].transpose(1, 0, 2)
    )
    assert transforms.square(noise(1, 1), 8).shape == (8, 8, 3)
    assert transforms.square(noise(1, 1000), 8).shape == (8, 8, 3)


def test_square_is_antialiased():
    y, x = np.mgrid[:64, :64]
    fine = np.repeat(((x + y) % 2 * 255).astype(np.uint8)[..., None], 3, -1)
    small = transforms.square(fine, 16)[2:-2, 2:-2].astype(int)
    assert np.abs(small - 127).max() < 10


def test_pad_keeps_everything_on_white():
    tall = noise(7, 4)
    got = transforms.pad(tall)
    assert got.shape == (7, 7, 3)
    np.testing.assert_array_equal(got[:, 1:5], tall)
    assert (got[:, 0] == 255).all()
    assert (got[:, 5:] == 255).all()
    np.testing.assert_array_equal(transforms.pad(noise(5, 5)), noise(5, 5))


def test_fit_takes_the_middle_of_the_sides_ratio():
    wide, tall = noise(6, 14), noise(13, 10)
    np.testing.assert_array_equal(transforms.fit(wide, (6, 10)), wide[:, 2:12])
    np.testing.assert_array_equal(transforms.fit(tall, (6, 10)), tall[3:9])
    assert transforms.fit(noise(1, 1000), (8, 3)).shape == (8, 3, 3)
    # Twice as large: the same part, enlarged.
    twice = wide.repeat(2, 0).repeat(2, 1)
    np.testing.assert_allclose(transforms.fit(twice, (6, 10)), wide[:, 2:12], atol=60)


def test_pad_to_a_rectangle_leaves_nothing_to_cut():
    tall, flat = noise(12, 8), noise(3, 20)
    assert transforms.pad(tall, (6, 10)).shape == (12, 20, 3)
    np.testing.assert_array_equal(transforms.pad(tall, (6, 10))[:, 6:14], tall)
    assert transforms.pad(flat, (6, 10)).shape == (12, 20, 3)
    np.testing.assert_array_equal(transforms.pad(flat, (6, 10))[4:7], flat)
    np.testing.assert_array_equal(transforms.pad(noise(6, 10), (3, 5)), noise(6, 10))


def test_to_float_spans_minus_one_to_one():
    got = transforms.to_float(np.array([[[0, 51, 255]]], np.uint8))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0, 0], [-1, -0.6, 1], atol=1e-6)


def test_flip_mirrors_half_of_the_pictures():
    image = noise(4, 4)
    flipped = [
        (transforms.flip(image, np.random.default_rng((0, i))) != image).any() for i in range(400)
    ]
    assert 150 < sum(flipped) < 250
    np.testing.assert_array_equal(
        transforms.flip(image, np.random.default_rng((0, flipped.index(True)))), image[:, ::-1]
    )
