"""Images from folders, zips and tars: the same pixels, found by name, refused by size before they are read."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import llava.train.shards as shards
from llava.images import ImageError
from llava.train.shards import ImageFolder, ImageShard, MissingImageError, map_images, open_images

IMAGES = Path(__file__).parents[1] / "oracle" / "images"
NAMES = ("tiny.png", "tall.png")


def packed(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip or tar with these members."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def files() -> dict[str, bytes]:
    return {f"a/{name}": (IMAGES / name).read_bytes() for name in NAMES}


@pytest.mark.parametrize(("name", "compression"), [("s.zip", zipfile.ZIP_STORED), ("s.zip", zipfile.ZIP_DEFLATED), ("s.tar", 0)])
def test_a_shard_gives_what_the_folder_gives(name: str, compression: int, files: dict[str, bytes], tmp_path: Path) -> None:
    shard = open_images(packed(tmp_path / name, files, compression))
    folder = open_images(IMAGES)
    assert isinstance(shard, ImageShard) and isinstance(folder, ImageFolder)
    for image in NAMES:
        assert shard.load(f"a/{image}").tobytes() == folder.load(image).tobytes()
        assert pickle.loads(pickle.dumps(shard)).load(f"a/{image}").size == folder.load(image).size
    assert shard.has("a/tiny.png") and not shard.has("tiny.png") and not shard.has("z")
    assert shard.key("x") == f"{tmp_path}/{name}/x" and folder.key("x") == str(IMAGES / "x")
    for place in (shard, folder):
        with pytest.raises(MissingImageError, match="none.png"):
            place.load("none.png")
    assert not [path for path in tmp_path.rglob("*.png")]


def test_every_process_opens_the_shard_for_itself(files: dict[str, bytes], tmp_path: Path) -> None:
    shard = ImageShard(packed(tmp_path / "s.zip", files))
    assert shard._file is None
    shard.load("a/tiny.png")
    mine = shard._file.fileno()
    child = os.fork()
    if child == 0:
        shard.load("a/tall.png")
        os._exit(0 if shard._process == os.getpid() and shard._file.fileno() != mine else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_sizes_are_checked_before_reading(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = packed(tmp_path / "b.zip", {"bomb.png": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED)
    shard = ImageShard(bomb)
    monkeypatch.setattr(shards.os, "pread", lambda *_: pytest.fail("the shard was read"))
    with pytest.raises(ImageError, match="bomb.png.* has 50,000,000 bytes, expected at most 20,000,000"):
        shard.load("bomb.png")


def test_a_zip_that_lies_about_a_size(files: dict[str, bytes], tmp_path: Path) -> None:
    """A member that unpacks to more than the directory says is cut off and refused."""
    path = packed(tmp_path / "s.zip", {"x.png": b"\0" * 1_000_000}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = (1000).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ImageError, match="size and checksum that the shard states"):
        ImageShard(path).load("x.png")


def test_broken_members_are_image_errors(files: dict[str, bytes], tmp_path: Path) -> None:
    for name in ("s.zip", "s.tar"):
        path = packed(tmp_path / name, {**files, "text.png": b"not an image"})
        shard = ImageShard(path)
        with pytest.raises(ImageError, match="'text.png' in .*not a readable image"):
            shard.load("text.png")
        data = path.read_bytes()
        path.write_bytes(data[:600])
        with pytest.raises(ImageError, match="the shard"):
            shard.load("a/tall.png")


def test_what_is_no_shard(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no zip")
    packed(tmp_path / "a.tar.gz", files)
    packed(tmp_path / "b.zip", files, zipfile.ZIP_LZMA)
    messages = {"a.zip": "cannot be read as a zip", "a.tar.gz": "without compressing the tar", "b.zip": "compressed by method 14"}
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / name)
    with pytest.raises(ValueError, match="no folder or shard of images at"):
        open_images(tmp_path / "none")


def test_names_with_a_leading_dot_and_links(files: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(IMAGES / "tiny.png", "./a/tiny.png")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    shard = ImageShard(path)
    assert shard.has("a/tiny.png") and not shard.has("link.png")


def test_prefixes(files: dict[str, bytes], tmp_path: Path) -> None:
    one = ImageShard(packed(tmp_path / "1.zip", {"tiny.png": files["a/tiny.png"]}))
    two = ImageShard(packed(tmp_path / "2.tar", {"tall.png": files["a/tall.png"]}))
    places = map_images({"x/": [one, two], "x/y/": [ImageFolder(IMAGES)]})
    sizes = {name: Image.open(IMAGES / name).size for name in (*NAMES, "wide.png")}
    assert places.load("x/tiny.png").size == sizes["tiny.png"] and places.load("x/tall.png").size == sizes["tall.png"]
    assert places.load("x/y/wide.png").size == sizes["wide.png"] and places.key("x/tall.png") == f"{tmp_path}/2.tar/tall.png"
    assert places.has("x/tall.png") and not places.has("x/wide.png") and not places.has("z")
    assert one.fingerprint in places.fingerprint and one.fingerprint != two.fingerprint
    with pytest.raises(MissingImageError, match="starts with none of 'x/y/', 'x/'"):
        places.load("z.png")
    with pytest.raises(MissingImageError, match="2.tar"):
        places.load("x/none.png")
