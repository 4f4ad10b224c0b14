"""Files that cost a decoder far more than their images are refused at once, and metadata never reaches it; what encoders write passes."""

from __future__ import annotations

import struct
import threading
import time
import tracemalloc
import zlib
from io import BytesIO

import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from llava.image_structure import _TIFF_TAGS, FORMATS, StructureError, bare_image, image_format
from llava.images import MAX_PIXELS, ImageError, decode_image

Image.init()  # so that `Image.SAVE` is whole
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


def directory(entries: list[tuple[int, int, int, int | None]], content: bytes) -> bytes:
    """A TIFF directory: tag, type, count and value each; a value of `None` is the place behind the directory, where `content` stands."""
    place = 8 + 2 + 12 * len(entries) + 4
    table = b"".join(struct.pack("<HHII", tag, kind, count, place if value is None else value) for tag, kind, count, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + b"\0\0\0\0" + content


def overlapping(count: int, size: int, kind: int = 1) -> bytes:
    """Exif data of an orientation, and of so many tags that all say that the same bytes are theirs."""
    unit = {1: 1, 5: 8}[kind]
    return directory([(274, 3, 1, 6)] + [(20_000 + tag, kind, size // unit, None) for tag in range(count)], b"\x55" * size)


def tiff_with(entries: list[tuple[int, int, int, int | None]], content: bytes) -> bytes:
    """A grey TIFF of 16 x 16 pixels, with further or other tags."""
    plain = {256: (4, 1, 16), 257: (4, 1, 16), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, None)}
    plain |= {277: (3, 1, 1), 278: (4, 1, 16), 279: (4, 1, 256)}
    tags = plain | {tag: rest for tag, *rest in entries}
    return directory([(tag, *rest) for tag, rest in sorted(tags.items())], content.ljust(256, b"\x55"))  # type: ignore[misc]


def riff(chunks: list[tuple[bytes, bytes]]) -> bytes:
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2) for kind, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_with(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A WebP that says it has Exif data and XMP, and further chunks."""
    width, height = (struct.pack("<I", side - 1)[:3] for side in NOISE.size)
    return riff([(b"VP8X", struct.pack("<I", 0x0C) + width + height), (b"VP8L", encode(NOISE, "WEBP", lossless=True)[20:]), *chunks])


def avif_with(exif: bytes) -> bytes:
    """An AVIF whose Exif data an encoder did not write."""
    told = b"II*\0\x08\0\0\0\0\0".ljust(len(exif), b"\0")
    avif = encode(NOISE, "AVIF", exif=b"Exif\0\0" + told)
    place = avif.index(told)
    return avif[:place] + exif + avif[place + len(exif) :]


def jpeg_with(segments: bytes) -> bytes:
    jpeg = encode(NOISE, "JPEG")
    return jpeg[:2] + segments + jpeg[2:]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with_chunks(*chunks: bytes) -> bytes:
    png = encode(NOISE, "PNG")
    return png[:33] + b"".join(chunks) + png[33:]


needs_avif = pytest.mark.skipif("AVIF" not in Image.SAVE, reason="this Pillow writes no AVIF")
SHARED = overlapping(300, 5_000_000)
RAW_PROFILE = b"Raw profile type exif\0\0" + zlib.compress(b"\n" * 900_000)
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
        (tiff_with([(20_000 + tag, 1, 500_000, None) for tag in range(40_000)], b"a" * 500_000), "has 40,009 tags, expected at most 4,096"),
        (tiff_with([(258, 3, 1_000_000, None)], b"a" * 2_000_000), "type 3 in tag 258, expected at most 16 of type 1, 3, 4, 16"),
        (tiff_with([(273, 4, 300_000, None)], b"a" * 1_200_000), "300,000 values of type 4 in tag 273"),
        (tiff_with([(273, 5, 100_000, None)], b"a" * 800_000), "100,000 values of type 5 in tag 273"),
        (b"MM\0*" + struct.pack(">I", 8), "broken header"),
        (jpeg_with(segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 300), "bytes of tables"),
        (riff([(b"VP8 ", b"")] + [(b"aaaa", b"")] * 25_000), "more than 20,000 chunks"),
        (b"\0\0\0\x10ftypavif\0\0\0\0" + b"\0\0\0\x08free" * 5_000, "more than 4,096 boxes"),
        (b"\0\0\0\x10ftypavif\0\0\0\0" + b"\0\0\0\x04free", "box of 4 bytes where 8 are left"),
        (b"\0\0\0\x10ftypavif\0\0\0\0" + b"\0\0\1\0free", "box of 256 bytes where 8 are left"),
    ],
)
def test_what_no_encoder_writes_is_refused_at_once(data: bytes, sentence: str) -> None:
    begun = time.process_time()
    with pytest.raises(ImageError, match=sentence):
        decode_image(data)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(tiff_with([(20_000 + tag, 1, 5_000_000, None) for tag in range(300)], b"a" * 5_000_000), id="TIFF tags that overlap"),
        pytest.param(tiff_with([(282, 5, 1_000_000, None)], b"a" * 8_000_000), id="TIFF resolutions"),
        pytest.param(tiff_with([(34_665, 4, 1, 256)], SHARED), id="TIFF with Exif data"),
        pytest.param(png_with_chunks(png_chunk(b"eXIf", SHARED)), id="PNG tags that overlap"),
        pytest.param(png_with_chunks(png_chunk(b"eXIf", overlapping(20, 8_000_000, 5))), id="PNG tags of rational numbers"),
        pytest.param(png_with_chunks(png_chunk(b"iCCP", b"k\0\0" + zlib.compress(b"a" * 1_000_000)) * 10_000), id="PNG profiles"),
        pytest.param(png_with_chunks(png_chunk(b"zTXt", RAW_PROFILE) * 1_000), id="PNG raw profiles"),
        pytest.param(jpeg_with(segment(0xE1, b"Exif\0\0" + b"\0" * 1_980) * 9_900), id="JPEG Exif segments"),
        pytest.param(
            jpeg_with(b"".join(segment(0xE1, b"Exif\0\0" + SHARED[at : at + 65_000]) for at in range(0, len(SHARED), 65_000))),
            id="JPEG tags that overlap",
        ),
        pytest.param(jpeg_with(segment(0xE2, b"MPF\0" + overlapping(5_000, 5_000))), id="JPEG list of images"),
        pytest.param(jpeg_with(segment(0xE2, b"ICC_PROFILE\0\1\1" + b"a" * 1_900) * 9_900), id="JPEG profiles"),
        pytest.param(webp_with([(b"EXIF", SHARED), (b"XMP ", b"tiff:Orientation" * 100_000)]), id="WebP tags that overlap"),
        pytest.param(avif_with(SHARED) if "AVIF" in Image.SAVE else b"", id="AVIF tags that overlap", marks=needs_avif),
    ],
)
def test_metadata_costs_nothing_and_never_reaches_pillows_reader_of_tags(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    load, seen = TiffImagePlugin.ImageFileDirectory_v2.load, set[int]()

    def note(self: TiffImagePlugin.ImageFileDirectory_v2, file: object) -> None:
        load(self, file)  # type: ignore[arg-type]
        seen.update(self)

    monkeypatch.setattr(TiffImagePlugin.ImageFileDirectory_v2, "load", note)
    begun = time.process_time()
    assert decode_image(data).mode == "RGB"
    assert time.process_time() - begun < 1
    assert seen <= (set(_TIFF_TAGS) if data.startswith(b"II") else set())


@pytest.mark.parametrize("line", [b"\n", b"00\n", b"z", b"\xff", b" "])
def test_a_raw_profile_takes_no_more_than_some_copies_of_the_file(line: bytes) -> None:
    """Its text is unpacked in the file already, so that no bound of unpacked bytes is in its way."""
    data = png_with_chunks(png_chunk(b"tEXt", b"Raw profile type exif\0\n\n\n" + line * (6_000_000 // len(line))))
    tracemalloc.start()
    try:
        bare_image(data, MAX_PIXELS)
        assert tracemalloc.get_traced_memory()[1] < 6 * len(data)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", FORMATS)
def test_the_bytes_say_what_a_file_is(name: str) -> None:
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {name}")
    data = encode(NOISE.convert("P") if name == "GIF" else NOISE, name)
    assert image_format(data) == name
    bare = bare_image(data, MAX_PIXELS)
    assert bare is not None and Image.open(BytesIO(bare.data)).format == name


def test_what_is_no_image_has_no_format() -> None:
    assert image_format(b"%PDF-1.4") == "" and bare_image(b"%PDF-1.4", MAX_PIXELS) is None


def test_what_a_jpegs_numbers_mean_stays_in_it() -> None:
    for mode, kept in (("RGB", b"JFIF\0"), ("CMYK", b"Adobe")):
        jpeg = encode(NOISE.convert(mode), "JPEG", comment=b"secret", icc_profile=b"secret", exif=b"Exif\0\0secret")
        bare = bare_image(jpeg, MAX_PIXELS)
        assert bare is not None and kept in bare.data and b"secret" not in bare.data and bare.exif == b"secret"
        assert decode_image(jpeg).tobytes() == Image.open(BytesIO(jpeg)).convert("RGB").tobytes()


def test_only_the_first_directory_of_a_tiff_is_left_and_places_stay_true() -> None:
    tiff = encode(NOISE, "TIFF", save_all=True, append_images=[NOISE], description="secret", compression="tiff_lzw")
    bare = bare_image(tiff, MAX_PIXELS)
    assert bare is not None
    opened = Image.open(BytesIO(bare.data))
    assert getattr(opened, "n_frames", 0) == 1 and 270 not in opened.tag_v2  # type: ignore[attr-defined]
    assert opened.convert("RGB").tobytes() == NOISE.tobytes()


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
    bare_image(data, MAX_PIXELS)


def test_the_walks_never_raise_anything_else() -> None:
    files = [progressive_jpeg(64, 3), encode(NOISE.convert("P"), "GIF"), encode(NOISE, "PPM"), RUN_LENGTHS]
    options = {"exif": b"Exif\0\0" + overlapping(3, 100), "xmp": b'tiff:Orientation="6"'}
    files += [encode(NOISE, kind, **options) for kind in ("JPEG", "PNG", "WEBP", "AVIF") if kind in Image.SAVE]
    files += [encode(NOISE, "TIFF", compression="tiff_lzw"), encode(NOISE, "TIFF", big_tiff=True)]
    for file in files:
        for place in range(0, min(len(file), 600), 3):
            broken = bytearray(file)
            broken[place] ^= 0xFF
            for data in (bytes(broken), file[:place]):
                try:
                    bare_image(data, MAX_PIXELS)
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
