"""Orientations are what Pillow reads of honest files, whoever wrote them, and nothing of dishonest ones."""

from __future__ import annotations

import io
import struct
import zlib
from itertools import product
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from llava.image_metadata import MAX_TAGS, read_directory, read_orientation
from llava.images import decode_image, to_rgb

Image.init()  # so that `Image.SAVE` is whole
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8))
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>',
    b"<rdf:Description><tiff:Make>me</tiff:Make><tiff:Orientation>%d</tiff:Orientation></rdf:Description>",
)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif_of(orientation: int, order: str = "II", kind: int = 3, prefix: bytes = b"") -> bytes:
    """Exif data as a camera writes it: maker, orientation, resolution, and a directory within the directory."""
    at = {"II": "<", "MM": ">"}[order]
    value = struct.pack(at + "HH", orientation, 0) if kind == 3 else struct.pack(at + "I", orientation)
    tags = [(271, 2, 10, struct.pack(at + "I", 62)), (274, kind, 1, value), (282, 5, 1, struct.pack(at + "I", 72))]
    tags.append((34665, 4, 1, struct.pack(at + "I", 80)))
    table = b"".join(struct.pack(at + "HHI", tag, type_, count) + field for tag, type_, count, field in tags)
    inner = struct.pack(at + "HHHI", 1, 36864, 7, 4) + b"0232" + struct.pack(at + "I", 0)
    whole = struct.pack(at + "HIH", 42, 8, len(tags)) + table + struct.pack(at + "I", 0)
    return prefix + order.encode() + whole + b"Maker abc\0" + struct.pack(at + "II", 72, 1) + inner


def segment(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(png: bytes, kind: bytes, content: bytes, behind: bool = False) -> bytes:
    place = len(png) - 12 if behind else 33
    return png[:place] + chunk(kind, content) + png[place:]


def raw_profile(exif: bytes) -> bytes:
    """Exif data as ImageMagick writes it into a PNG."""
    digits = exif.hex()
    lines = [digits[at : at + 72] for at in range(0, len(digits), 72)]
    return f"\nexif\n{len(exif):8}\n{chr(10).join(lines)}\n".encode()


def jpegs(exif: bytes, prefix: bytes) -> list[bytes]:
    jpeg = encode(NOISE, "JPEG")
    film = encode(NOISE, "MPO", save_all=True, append_images=[NOISE.rotate(180)])
    return [file[:2] + segment((b"" if prefix else b"Exif\0\0") + exif) + file[2:] for file in (jpeg, film)]


def pngs(exif: bytes, prefix: bytes) -> list[bytes]:
    png = encode(NOISE, "PNG")
    text = raw_profile(exif if prefix else b"Exif\0\0" + exif)
    return [
        with_chunk(png, b"eXIf", exif),
        with_chunk(png, b"eXIf", exif, behind=True),
        with_chunk(png, b"tEXt", b"Raw profile type exif\0" + text),
        with_chunk(png, b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
    ]


def webps(exif: bytes, prefix: bytes) -> list[bytes]:
    return [encode(NOISE, "WEBP", exif=exif, lossless=True), encode(NOISE.convert("RGBA"), "WEBP", exif=exif)]


WRITERS = {"JPEG": jpegs, "PNG": pngs, "WEBP": webps}


def upright_by_pillow(data: bytes) -> Image.Image:
    return to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


def assert_as_pillow(data: bytes) -> None:
    found, expected = decode_image(data), upright_by_pillow(data)
    assert found.size == expected.size and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("name", WRITERS)
def test_exif_data_turns_an_image_as_pillow_does(name: str, order: str) -> None:
    for orientation, kind, prefix in product(range(10), (3, 4), (b"", b"Exif\0\0")):
        for file in WRITERS[name](exif_of(orientation, order, kind, prefix), prefix):
            assert_as_pillow(file)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("packing", [None, "tiff_lzw", "tiff_deflate", "packbits"])
def test_a_tiff_is_turned_as_by_pillow(mode: str, packing: str | None, big: bool) -> None:
    for orientation in range(1, 9):
        assert_as_pillow(encode(NOISE.convert(mode), "TIFF", compression=packing, tiffinfo={274: orientation, 270: "a" * 99}, big_tiff=big))


@pytest.mark.parametrize("mode", ["1", "L"])
def test_a_tiff_in_the_other_byte_order_is_turned_as_by_pillow(mode: str) -> None:
    pixels = NOISE.convert(mode).tobytes()
    for orientation in range(1, 9):
        tags = [(256, 3, 9), (257, 3, 5), (258, 3, 1 if mode == "1" else 8), (259, 3, 1), (262, 3, 1), (273, 4, 122), (274, 3, orientation)]
        tags += [(278, 3, 5), (279, 4, len(pixels))]
        table = b"".join(struct.pack(">HHI", tag, kind, 1) + struct.pack(">I" if kind == 4 else ">Hxx", value) for tag, kind, value in tags)
        assert_as_pillow(b"MM\0*" + struct.pack(">IH", 8, len(tags)) + table + b"\0\0\0\0" + pixels)


@pytest.mark.skipif("AVIF" not in Image.SAVE, reason="this Pillow writes no AVIF")
def test_an_avif_is_turned_as_by_pillow() -> None:
    for orientation in range(1, 9):
        assert_as_pillow(encode(NOISE, "AVIF", exif=exif_of(orientation, prefix=b"Exif\0\0")))
        assert_as_pillow(encode(NOISE, "AVIF", xmp=XMP[0] % orientation))


@pytest.mark.parametrize("form", XMP)
def test_xmp_turns_an_image_where_exif_data_does_not_say(form: bytes) -> None:
    for orientation in range(1, 9):
        xmp = form % orientation
        jpeg, png = encode(NOISE, "JPEG"), encode(NOISE, "PNG")
        packed = b"XML:com.adobe.xmp\0\1\0en\0key\0" + zlib.compress(xmp)
        files = [
            jpeg[:2] + segment(b"http://ns.adobe.com/xap/1.0/\0" + xmp) + jpeg[2:],
            jpeg[:2] + segment(b"http://ns.adobe.com/xap/1.0/\0" + xmp) + segment(b"Exif\0\0" + exif_of(3)) + jpeg[2:],
            with_chunk(png, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
            with_chunk(png, b"iTXt", packed),
            encode(NOISE, "WEBP", xmp=xmp, lossless=True),
            encode(NOISE, "TIFF", tiffinfo={700: xmp}),
            encode(NOISE, "TIFF", tiffinfo={700: xmp, 274: 8}),
        ]
        for file in files:
            assert_as_pillow(file)


@pytest.mark.parametrize(
    ("exif", "xmp", "found"),
    [
        (b"", b"", 1),
        (exif_of(6), b"", 6),
        (b"Exif\0\0" * 2 + exif_of(6), b"", 6),
        (b"Exif\0\0" * 3 + exif_of(6), b"", 1),
        (exif_of(9), b"", 1),
        (exif_of(0), b'tiff:Orientation="6"', 1),  # said, and nonsense
        (b"", b'tiff:Orientation="6"', 6),
        (b"", b'tiff:Orientation="9"', 1),
        (b"nothing of the kind", b"<tiff:Orientation>5", 5),
        (exif_of(6)[:20], b"", 1),  # ends within the tags
        (b"II*\0\xff\xff\xff\xff", b"", 1),  # a directory beyond the end
        (b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHI", 274, 2, 1) + b"6\0\0\0", b"", 1),  # a text
        (b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHI", 274, 3, 0) + b"\6\0\0\0", b"", 1),  # no value
        (b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 274, 3, 4, 2**32 - 1), b"", 1),  # a value beyond the end
        (b"II+\0\x08\0\0\0\x10" + b"\0" * 7 + b"\1" + b"\0" * 7 + struct.pack("<HHQQ", 274, 3, 1, 6), b"", 6),  # BigTIFF
    ],
)
def test_what_is_read(exif: bytes, xmp: bytes, found: int) -> None:
    assert read_orientation(exif, xmp) == found


def test_a_directory_says_more_than_is_read() -> None:
    many = b"II*\0\x08\0\0\0" + struct.pack("<H", 65_535) + struct.pack("<HHII", 1, 1, 1, 0) * 65_535
    directory = read_directory(many)
    assert directory is not None and directory.count == 65_535 and len(directory.entries) == MAX_TAGS
