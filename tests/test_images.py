"""Every kind of picture a user may hand in becomes the right RGB picture or one clear sentence."""

from __future__ import annotations

import base64
import http.server
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from packaging import version
from PIL import Image, PpmImagePlugin

from llava import fetch as fetch_module
from llava import images as images_page
from llava.fetch import FetchError, fetch, is_public_address, literal_address, split_url
from llava.images import ImageError, decode_image, load_image, load_image_from_base64, load_images, to_rgb


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GRADIENT = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8))
PNG = encode(GRADIENT)


# --- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(file_format: str) -> None:
    image = decode_image(encode(GRADIENT, file_format))
    assert image.mode == "RGB"
    assert image.tobytes() == GRADIENT.tobytes()


def test_1x1() -> None:
    assert decode_image(encode(Image.new("RGB", (1, 1), (9, 8, 7)))).getpixel((0, 0)) == (9, 8, 7)


def test_transparency_is_laid_on_white() -> None:
    half = decode_image(encode(Image.new("RGBA", (2, 2), (200, 0, 0, 128))))
    assert half.getpixel((0, 0)) == (227, 127, 127)
    assert decode_image(encode(Image.new("LA", (2, 2), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for file_format in ("PNG", "GIF"):
        decoded = decode_image(encode(image, file_format, transparency=1))
        assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_transparent_colour_of_an_rgb_file() -> None:
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((0, 0), (1, 2, 3))
    decoded = decode_image(encode(image, transparency=(1, 2, 3)))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(file_format: str) -> None:
    values = np.array([[0, 257, 32768, 65535, 300]], dtype=np.uint16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(values), file_format)))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255, 1]
    assert (decoded == decoded[..., :1]).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_images_converted_in_stripes_are_those_converted_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.effect_noise((37, 23), 90).convert("RGB")
    image = Image.fromarray(np.arange(23 * 37, dtype=np.uint16).reshape(23, 37) * 77) if mode.startswith("I") else noise.convert(mode)
    image = image.convert("I") if mode == "I" else image
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.effect_noise((37, 23), 90))
    if mode in ("P", "L"):
        image.info["transparency"] = 7
    whole = to_rgb(image)
    for pixels in (1, 37, 100, 850):  # less than a row, a row, two of them, all but the last
        monkeypatch.setattr(images_page, "_STRIPE_PIXELS", pixels)
        assert to_rgb(image).tobytes() == whole.tobytes()


def test_32_bit_and_float_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match="from 0 to 70000, expected 0 to 65535"):
        to_rgb(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)))
    with pytest.raises(ImageError, match="floating-point"):
        decode_image(encode(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize(
    ("mode", "packing"), [("1", None), ("L", None), ("P", None), ("CMYK", None), ("YCbCr", None), ("YCbCr", "tiff_lzw"), ("RGB", "jpeg")]
)
def test_other_modes_become_rgb(mode: str, packing: str | None) -> None:
    data = encode(Image.new("RGB", (20, 10), "white").convert(mode), "TIFF", compression=packing)
    if (mode, packing) == ("YCbCr", None) and version.parse(PIL.__version__) < version.parse("13"):
        with pytest.raises(ImageError, match="truncated or broken"):  # Pillow reads unpacked YCbCr since 13
            decode_image(data)
        return
    decoded = decode_image(data)
    assert (decoded.mode, decoded.size) == ("RGB", (20, 10))
    assert decoded.getpixel((3, 3)) == (255, 255, 255)


def test_cmyk_jpeg_is_not_inverted() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = decode_image(encode(image, "JPEG", quality=95)).getpixel((8, 8))  # type: ignore[misc]
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste((255, 0, 0), (0, 0, 8, 8))  # red mark, top left
    undo = [
        None,
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_90,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270,
    ][orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if undo is None else upright.transpose(undo)
    decoded = decode_image(encode(stored, "PNG", exif=exif))
    assert decoded.size == (32, 16)
    assert decoded.tobytes() == upright.tobytes()


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_gives_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data).getpixel((4, 4)) == (255, 0, 0)


def test_decoding_twice_gives_the_same() -> None:
    data = encode(GRADIENT, "JPEG")
    assert decode_image(data).tobytes() == decode_image(data).tobytes()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "holds 0 bytes"),
        (b"not an image at all", "19 bytes are not a readable image, expected one of PNG, JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a readable image"),
        (png_header(30_000, 30_000), "900000000 pixels"),
        (png_header(10_000, 10_000), "10000 x 10000 = 100,000,000 pixels, expected at most 64,000,000"),
        (png_header(1, 4000), "1 x 4000 pixels, expected an aspect ratio of at most 200:1"),
        (png_header(4000, 19), "4000 x 19 pixels"),
        (png_header(0, 10), "image"),
        (png_header(50, 50), "truncated or broken"),
        (PNG[: len(PNG) // 2], "truncated or broken"),
        (encode(GRADIENT, "JPEG")[:-200], "truncated or broken"),
        (encode(GRADIENT, "BMP")[:-200], "truncated or broken"),
        (PNG[:20], "image"),
    ],
)
def test_bad_data_is_refused_in_one_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_longest_shape_allowed() -> None:
    assert decode_image(encode(Image.new("RGB", (200, 1)))).size == (200, 1)


def test_caps_can_be_set() -> None:
    with pytest.raises(ImageError, match="2,400 pixels, expected at most 2,399"):
        decode_image(PNG, max_pixels=2399)
    with pytest.raises(ImageError, match="expected at most 100"):
        decode_image(PNG, max_bytes=100)


def test_flipped_bytes_never_raise_anything_else() -> None:
    generator = np.random.default_rng(0)
    for file_format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        data = encode(GRADIENT, file_format)
        for _ in range(40):
            broken = bytearray(data)
            for position in generator.integers(0, len(data), 4):
                broken[position] = generator.integers(0, 256)
            try:
                assert decode_image(bytes(broken), max_pixels=1_000_000).mode == "RGB"
            except ImageError:
                pass


# --- sources ----------------------------------------------------------------------------------------------------------


def test_files_and_their_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    assert load_image(path).tobytes() == load_image(str(path)).tobytes() == load_image(PNG).tobytes()
    for missing in (str(tmp_path / "b.png"), str(tmp_path), "x" * 5000, "a\0b", ""):
        with pytest.raises(ImageError, match="no image file|cannot be read"):
            load_image(missing)
    with pytest.raises(ImageError, match="files are not read here"):
        load_image(path, allow_local=False)
    with pytest.raises(ImageError, match="expected at most 10"):
        load_image(path, max_bytes=10)


@pytest.mark.parametrize("name", ["a.jpg", "a.txt", "a.PNG", "a", "a.tar.gz"])
def test_a_files_name_says_nothing_about_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for file_format in ("PNG", "BMP", "TIFF"):
        path.write_bytes(encode(GRADIENT, file_format))
        assert load_image(path).tobytes() == GRADIENT.tobytes()


def test_several_files_in_order(tmp_path: Path) -> None:
    for i, size in enumerate([(3, 4), (5, 6)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    images = load_images([str(tmp_path / "1.png"), str(tmp_path / "0.png")])
    assert [image.size for image in images] == [(5, 6), (3, 4)]
    with pytest.raises(ImageError, match="wrap it in a list"):
        load_images("a.png")


def test_base64_and_data_urls() -> None:
    text = base64.b64encode(PNG).decode()
    expected = GRADIENT.tobytes()
    assert load_image_from_base64(text).tobytes() == expected
    assert load_image_from_base64(base64.encodebytes(PNG)).tobytes() == expected
    assert load_image(f"data:image/png;base64,{text}", allow_local=False).tobytes() == expected
    assert load_image(f"DATA:image/png;charset=x;base64,{text}").tobytes() == expected


URL_SAFE = base64.urlsafe_b64encode(PNG).decode()
PERCENT = base64.b64encode(PNG).decode().replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")


@pytest.mark.parametrize(
    "url",
    [
        *(
            f"data:{kind};base64,{base64.b64encode(PNG).decode()}"
            for kind in ("", "image", "application/octet-stream", "image/jpeg", "text/html")
        ),
        f"data:image/png; base64,{base64.b64encode(PNG).decode()}",
        f"data:image/png;base64,{PERCENT}",
        f"data:image/png;base64,{URL_SAFE}",
        f"data:image/png;base64,{URL_SAFE.rstrip('=')}",
        f"data:image/png;base64,{base64.encodebytes(PNG).decode()}",
        f"data:image/png;base64,{base64.encodebytes(PNG).decode()}".replace("\n", "%0D%0A"),
        "data:image/png," + "".join(f"%{byte:02X}" for byte in PNG),
    ],
)
def test_a_data_url_is_judged_by_its_bytes(url: str) -> None:
    assert load_image(url, allow_local=False).tobytes() == GRADIENT.tobytes()


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:image/png;base64",
        "data:text/html;base64,AAAA",
        "data:image/png,AAAA",
        "data:;base64,AAAA",
        "data:image/png;base64,AAAAA",
        "data:image/png;base64,%%%%",
        "data:image/png;base64,A===A",
        "data:image/png;base64,é",
        "data:image/png;base64,",
        "data:image/png;base64,AAAA",
    ],
)
def test_bad_data_urls_are_refused(url: str) -> None:
    with pytest.raises(ImageError):
        load_image(url)


def test_base64_length_is_checked_before_decoding() -> None:
    with pytest.raises(ImageError, match="too many for 10 bytes"):
        load_image("data:image/png;base64," + "A" * 100, max_bytes=10)
    with pytest.raises(ImageError, match="too many for 10 bytes"):
        load_image("data:image/png," + "%41" * 10, max_bytes=10)


@pytest.mark.parametrize("url", ["http://example.org/a.png", "HTTPS://example.org/a.png"])
def test_web_addresses_are_off_unless_asked_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("a name was resolved"))
    with pytest.raises(ImageError, match="fetching is off"):
        load_image(url)


@pytest.mark.parametrize("url", ["ftp://example.org/a.png", "file:///etc/passwd", "gopher://x"])
def test_other_schemes_are_no_way_in(url: str) -> None:
    with pytest.raises(ImageError, match="no image file"):
        load_image(url, allow_remote=True)


# --- which addresses are public ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert is_public_address(address)


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 127.1 0.0.0.0 0 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1
    100.127.255.255 192.0.0.1 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 192.88.99.1 224.0.0.1 239.1.1.1
    240.0.0.1 255.255.255.255
    2130706433 0x7f000001 017700000001 0177.0.0.1 0x7f.0.0.1 0x7f.1 2852039166 0xa9fea9fe 3232235777 127.0.0.1.
    :: ::1 [::1] ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:7f00:1 ::ffff:0:127.0.0.1 64:ff9b::7f00:1
    64:ff9b::10.0.0.1 64:ff9b:1::1 2002:7f00:1:: 2002:0a00:0001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1
    3fff::1 5f00::1 fc00::1 fd12:3456::1 fe80::1 fe80::1%eth0 fe80::1%25eth0 fec0::1 ff02::1 100::1
    example.org localhost 1.2.3.4.5 256.1.1.1 4294967296 08.8.8.8 1.1.1.1%0""".split(),
)
def test_everything_else_is_not_public(address: str) -> None:
    assert not is_public_address(address)


def test_numeric_spellings_are_read_as_the_c_library_does() -> None:
    for text in ("2130706433", "0x7f000001", "017700000001", "127.1", "0177.0.0.1", "127.0.0.1."):
        assert str(literal_address(text)) == "127.0.0.1"
    assert literal_address("127.0.0.1.nip.io") is None
    assert literal_address("1234567890123") is None


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/a",
        "//example.org/a",
        "http:///a",
        "http://",
        "http://user@example.org/",
        "http://user:word@example.org/",
        "http://@example.org/",
        "http://example.org:99999/",
        "http://example.org:0/",
        "http://example.org:x/",
        "http://[::1/",
        "http://example.org\\@127.0.0.1/",
        "http://example.org/a b",
        "http://example.org/\r\nX: y",
        " http://example.org/",
    ],
)
def test_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises(FetchError):
        split_url(url)


class Recorder:
    """Stands in for the network: says what a name resolves to, and notes every connection asked for."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.connections: list[tuple[str, int]] = []

    def resolve(self, host: str, port: int) -> list[str]:
        return self.addresses

    def connect(self, address: str, port: int, timeout: float) -> socket.socket:
        self.connections.append((address, port))
        raise ConnectionRefusedError

    def fetch(self, url: str) -> bytes:
        return fetch(url, max_bytes=1000, resolve=self.resolve, connect=self.connect)


@pytest.mark.parametrize(
    "private", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fe80::1%2"]
)
def test_a_name_with_one_private_address_is_never_connected_to(private: str) -> None:
    for addresses in ([private], ["8.8.8.8", private], [private, "8.8.8.8"]):
        network = Recorder(*addresses)
        with pytest.raises(FetchError, match="not on the public internet"):
            network.fetch("https://pictures.example.org/a.png")
        assert network.connections == []


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:10.0.0.1]", "169.254.169.254"])
def test_private_hosts_written_as_numbers_are_never_connected_to(host: str) -> None:
    network = Recorder()
    with pytest.raises(FetchError, match="not on the public internet"):
        fetch(f"http://{host}/latest", max_bytes=1000, connect=network.connect)
    assert network.connections == []


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    network = Recorder("8.8.8.8", "1.1.1.1")
    with pytest.raises(FetchError, match="no connection to the host 'pictures.example.org'"):
        network.fetch("https://pictures.example.org:8443/a.png")
    assert network.connections == [("8.8.8.8", 8443), ("1.1.1.1", 8443)]


def test_a_redirect_passes_the_same_door() -> None:
    """A public host answers with a redirect to a private one; only the first is ever connected to."""
    seen = []

    def connect(address: str, port: int, timeout: float) -> socket.socket:
        seen.append(address)
        ours, theirs = socket.socketpair()
        theirs.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/latest\r\nContent-Length: 0\r\n\r\n")
        theirs.shutdown(socket.SHUT_WR)
        sockets.append(theirs)
        return ours

    sockets: list[socket.socket] = []

    def resolve(host: str, port: int) -> list[str]:
        return ["8.8.8.8"] if host == "pictures.example.org" else fetch_module.resolve_host(host, port)

    with pytest.raises(FetchError, match="'169.254.169.254' is not on the public internet"):
        fetch("http://pictures.example.org/a", max_bytes=1000, resolve=resolve, connect=connect)
    assert seen == ["8.8.8.8"]
    assert b"Host: pictures.example.org\r\n" in sockets[0].recv(4096)
    sockets[0].close()


# --- a real server on this machine ------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a picture in good and bad ways."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        length = {"Content-Length": str(len(PNG))}
        actions: dict[str, Callable[[], None]] = {
            "/a.png": lambda: self.answer(200, length, PNG),
            "/unsized": lambda: self.answer(200, {}, PNG),
            "/once": lambda: self.answer(302, {"Location": "/a.png"}),
            "/loop": lambda: self.answer(301, {"Location": "/loop"}),
            "/to-file": lambda: self.answer(302, {"Location": "file:///etc/hostname"}),
            "/nowhere": lambda: self.answer(302, {}),
            "/text": lambda: self.answer(200, {}, b"<html>sign in</html>"),
            "/large": lambda: self.answer(200, {"Content-Length": "99999999999"}),
            "/endless": self.endless,
            "/drip": self.drip,
            "/short": lambda: self.answer(200, {"Content-Length": str(len(PNG) + 50)}, PNG),
        }
        actions.get(self.path, lambda: self.answer(404, {}))()

    def endless(self) -> None:
        self.answer(200, {})
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            pass

    def drip(self) -> None:
        try:
            for _ in range(100):
                self.wfile.write(b"H")
                time.sleep(0.05)
        except OSError:
            pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def get(url: str, **options: Any) -> Image.Image:
    return load_image(url, allow_remote=True, allow_private=True, **options)


@pytest.mark.parametrize("path", ["/a.png", "/unsized", "/once"])
def test_remote_picture(server: str, path: str) -> None:
    assert get(server + path).tobytes() == GRADIENT.tobytes()


def test_a_name_and_several_sources(server: str) -> None:
    by_name = server.replace("127.0.0.1", "localhost")
    images = load_images([f"{by_name}/a.png", f"{server}/a.png"], allow_remote=True, allow_private=True)
    assert [image.size for image in images] == [(60, 40), (60, 40)]


def test_this_machine_is_refused_by_default(server: str) -> None:
    with pytest.raises(ImageError, match="not on the public internet"):
        load_image(f"{server}/a.png", allow_remote=True)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/loop", "redirected more than 3 times"),
        ("/to-file", "not of the form http"),
        ("/nowhere", "without saying where"),
        ("/text", "not a readable image"),
        ("/gone", "status 404"),
        ("/large", "larger than 5,000 bytes"),
        ("/endless", "larger than 5,000 bytes"),
        ("/short", "broke off|early"),
    ],
)
def test_bad_answers_are_refused(server: str, path: str, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        get(server + path, max_bytes=5000)


def test_a_dripping_server_is_left_at_the_deadline(server: str) -> None:
    start = time.monotonic()
    with pytest.raises(ImageError, match="took too long"):
        get(f"{server}/drip", timeout=0.4)
    assert time.monotonic() - start < 3


def test_plain_text_where_tls_is_expected(server: str) -> None:
    with pytest.raises(ImageError, match="no secure connection"):
        get(server.replace("http:", "https:") + "/a.png")


def test_a_closed_port() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ImageError, match="no connection to the host"):
        get(f"http://127.0.0.1:{port}/a.png")


@pytest.mark.parametrize("largest", [1, 3, 100, 254, 255, 256, 1000, 4095, 65534, 65535])
@pytest.mark.parametrize(("kind", "bands"), [("P5", 1), ("P6", 3)])
def test_a_ppm_of_any_largest_value_is_read_at_once_to_the_numbers_that_pillow_reads(
    kind: str, bands: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(largest).integers(0, largest + 1, 7 * 5 * bands).astype(">u2" if largest > 255 else "u1")
    data = f"{kind} # a comment\n7 5\n{largest}\n".encode() + values.tobytes()
    with Image.open(BytesIO(data)) as image:
        image.load()
        wanted = to_rgb(image)
    monkeypatch.delattr(PpmImagePlugin.PpmDecoder, "decode")
    assert decode_image(data).tobytes() == wanted.tobytes()


def test_a_large_ppm_that_only_pillow_could_read_value_by_value_is_refused() -> None:
    for head in (b"P5 1100 11#\n00 3\n", b"PyRGBA 600 600 3\n", b"P0CMYK 600 600 3\n"):
        with pytest.raises(ImageError, match="unusual header: save it as PNG"):
            decode_image(head + b"\1" * 1_440_000)
