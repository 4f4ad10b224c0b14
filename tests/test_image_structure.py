"""Files that cost a decoder far more than their pictures are refused at once; what encoders write passes."""

from __future__ import annotations

import struct
import threading
import time
import zlib
from io import BytesIO

import pytest
from PIL import Image, ImageFile

from llava.image_structure import StructureError, check_structure
from llava.images import ImageError, decode_image

NOISE = Image.effect_noise((320, 240), 60).convert("RGB")


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def segment(mark: int, content: bytes) -> bytes:
    return b"\xff" + bytes([mark]) + struct.pack(">H", len(content) + 2) + content


def bits(text: str) -> bytes:
    text += "1" * (-len(text) % 8)
    return bytes(int(text[place : place + 8], 2) for place in range(0, len(text), 8)).replace(b"\xff", b"\xff\0")


def progressive_jpeg(side: int, scans: int) -> bytes:
    """A grey picture in one scan of its means and so many more that say nothing, each a few bytes long."""
    blocks = (side // 8) ** 2
    header = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    tables = segment(0xC4, b"\0\1" + b"\0" * 16) + segment(0xC4, b"\x10\1" + b"\0" * 15 + b"\xe0")
    runs, left = "", blocks
    while left > 0:
        run = max(min(left, 32767), 16384)
        runs, left = runs + "0" + format(run - 16384, "014b"), left - run
    means = segment(0xDA, b"\1\1\0\0\0\0") + bits("0" * blocks)
    return b"\xff\xd8" + header + tables + means + (segment(0xDA, b"\1\1\0\1\x3f\0") + bits(runs)) * scans + b"\xff\xd9"


def tiled_tiff(tile: int) -> bytes:
    """A TIFF of 16 x 16 pixels in one deflated tile."""
    pixels = zlib.compress(b"\0" * min(tile * tile, 10_000_000), 9)
    entries = [(256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, 4, tile), (323, 4, tile)]
    offset = 8 + 2 + 12 * (len(entries) + 2) + 4
    entries += [(324, 4, offset), (325, 4, len(pixels))]
    table = b"".join(struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + b"\0\0\0\0" + pixels


def png_with(chunk: bytes, count: int) -> bytes:
    png = encode(NOISE, "PNG")
    whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:33] + whole * count + png[33:]


def gif_with(blocks: bytes) -> bytes:
    gif = encode(NOISE.convert("P"), "GIF")
    colours = 13 + (3 << (gif[10] & 7) + 1)
    return gif[:colours] + blocks + gif[colours:]


RUN_LENGTHS = b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 1078, 40, 8000, 8000, 1, 8, 1, 0, 0, 0, 0, 0) + b"\0" * 1024


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (progressive_jpeg(64, 101), "more than 100 scans"),
        (b"\xff\xd8" + segment(0xE0, b"") * 20_000, "more than 10,000 segments"),
        (b"\xff\xd8" + b"\xff" * 100_000, "100,000 bytes between two segments"),
        (b"\xff\xd8" + b"\xff\xd0" * 50_000, "bytes between two segments"),
        (b"\xff\xd8" + segment(0xE0, b"") + b"\0" * 100_000, "100,000 bytes between two segments"),
        (tiled_tiff(20_000), "tiles of 20000 x 20000 pixels"),
        (png_with(b"aaAa", 25_000), "more than 20,000 chunks"),
        (gif_with(b"\x21\xfe\x01a\0" * 100_000), "more than 4,000 blocks"),
        (gif_with(b"\x21\xfe" + b"\x01a" * 100_000 + b"\0"), "more than 4,000 blocks"),
        (gif_with(b"\0" * 100_000), "more than 4,000 blocks"),
        (b"P6 " + b"#a\n" * 100_000 + b"9 9 255\n" + b"a" * 243, "header of more than 1,024 bytes"),
        (b"P6 " + b" " * 100_000 + b"9 9 255\n" + b"a" * 243, "header of more than 1,024 bytes"),
        (b"P3 2500 2500 255 " + b"1 " * 600_000, "bytes of text"),
        (RUN_LENGTHS + b"\0\0" * 600_000, "bytes of run lengths"),
    ],
)
def test_what_no_encoder_writes_is_refused_at_once(data: bytes, sentence: str) -> None:
    begun = time.process_time()
    with pytest.raises(ImageError, match=sentence):
        decode_image(data)
    assert time.process_time() - begun < 1


def test_a_tiff_of_progressive_jpegs_has_their_limit() -> None:
    tiff = encode(NOISE, "TIFF", compression="jpeg")
    parts = tiff.count(b"\xff\xda")
    assert decode_image(tiff).size == NOISE.size
    with pytest.raises(ImageError, match=f"more than {100 + parts} scans"):
        decode_image(tiff + b"\xff\xda" * 101)


@pytest.mark.parametrize(
    "data",
    [
        progressive_jpeg(64, 90),
        encode(NOISE, "JPEG", progressive=True, quality=95),
        encode(NOISE, "JPEG", restart_marker_rows=1),
        encode(NOISE, "JPEG", comment=b"\xff\xda" * 500),  # in a comment
        encode(NOISE, "JPEG") + b"\xff\xda" * 500,  # behind the end, where telephones put films
        encode(NOISE, "PNG"),
        png_with(b"tEXta\0b", 1000),
        encode(NOISE.convert("P"), "GIF", comment=b"c" * 100_000),
        gif_with(b"\x21\xfe\x01a\0" * 100),
        encode(NOISE, "BMP"),
        encode(NOISE, "PPM"),
        encode(NOISE.convert("1"), "PPM"),
        b"P3 2 1 255 1 2 3 4 5 6",
        encode(NOISE, "TIFF", compression="tiff_lzw"),
        encode(NOISE, "WEBP"),
    ],
)
def test_what_encoders_write_passes(data: bytes) -> None:
    assert decode_image(data).mode == "RGB"


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"GIF89a\0\0\0\0\x80", b"P", b"P6", b"BM", b"\0" * 50]
)
def test_stumps_are_left_to_the_decoder(data: bytes) -> None:
    check_structure(data)


def test_the_walks_never_raise_anything_else() -> None:
    files = [progressive_jpeg(64, 3), encode(NOISE, "PNG"), encode(NOISE.convert("P"), "GIF"), encode(NOISE, "PPM"), RUN_LENGTHS]
    for file in files:
        for place in range(0, min(len(file), 600), 3):
            broken = bytearray(file)
            broken[place] ^= 0xFF
            for data in (bytes(broken), file[:place]):
                try:
                    check_structure(data)
                except StructureError:
                    pass


def test_truncated_files_are_refused_also_where_pillow_was_told_to_fill_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval does for its process
    failures: list[str] = []

    def decode(data: bytes) -> None:
        for _ in range(20):
            try:
                decode_image(data)
                failures.append("taken")
            except ImageError:
                pass

    halves = [encode(NOISE, kind)[:-3000] for kind in ("PNG", "JPEG")]
    threads = [threading.Thread(target=decode, args=(data,)) for data in halves * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and ImageFile.LOAD_TRUNCATED_IMAGES is True
