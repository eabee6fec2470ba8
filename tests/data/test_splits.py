from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from lightning_cap.data.splits import check_folder, check_tar
from lightning_cap.errors import DataError
from tests.support.images import CLASSES, image_data, jpeg, small_images, write_folder, write_tar


def headers(tar: Path) -> list[int]:
    """Where each member begins, and where the last one ends."""
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
        return [*(member.offset for member in members), archive.offset]


def overwritten(tar: Path, start: int, content: bytes) -> None:
    whole = bytearray(tar.read_bytes())
    whole[start : start + len(content)] = content
    tar.write_bytes(bytes(whole))


@pytest.mark.parametrize("content", [bytes(512), b"x" * 512, b"\xff" * 20], ids=["zeros", "letters", "some bytes"])
def test_damaged_header_in_the_middle(tmp_path: Path, content: bytes) -> None:
    tar = write_tar(tmp_path / "val.tar", small_images())
    overwritten(tar, headers(tar)[5], content)
    with pytest.raises(DataError, match=rf"val.tar' is no complete .tar archive.*byte {headers(tar)[5]} is damaged"):
        image_data(tmp_path).setup("validate")


@pytest.mark.parametrize("kept", [0, 512], ids=["no empty block", "one empty block"])
def test_cut_at_a_member(tmp_path: Path, kept: int) -> None:
    tar = write_tar(tmp_path / "val.tar", small_images())
    place = headers(tar)[5]
    tar.write_bytes(tar.read_bytes()[:place] + bytes(kept))
    with pytest.raises(DataError, match=rf"val.tar' .*breaks off at byte {place}"):
        image_data(tmp_path).setup("validate")


def test_space_reserved_for_a_download_that_ended(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "val.tar", small_images())
    with open(tar, "r+b") as file:
        file.truncate(headers(tar)[5])
        file.truncate(50 * 2**20)
    with pytest.raises(DataError, match="reserved and never written"):
        check_tar(tar)


def test_two_archives_in_one_file(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "val.tar", small_images())
    tar.write_bytes(tar.read_bytes() * 2)
    with pytest.raises(DataError, match="more follows"):
        check_tar(tar)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("padding", [1024, 10_240, 2**20])
def test_whole_archives_pass(tmp_path: Path, form: int, padding: int) -> None:
    long = (
        "cat/" + "a-rather-long-name-" * (4 if form == tarfile.USTAR_FORMAT else 9) + ".jpg"
    )  # in a header of its own
    images = {**small_images(), long: jpeg(1)}
    with tarfile.open(tmp_path / "val.tar", "w", format=form) as archive:
        for name, content in images.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    whole = (tmp_path / "val.tar").read_bytes()
    end = headers(tmp_path / "val.tar")[-1]
    (tmp_path / "val.tar").write_bytes(whole[:end] + bytes(padding))
    assert check_tar(tmp_path / "val.tar") == 13
    assert len(image_data(tmp_path).validation_set()) == 13


@pytest.mark.parametrize("program", ["tar", "bsdtar"])
def test_archives_of_other_programs_pass(tmp_path: Path, program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"no {program}")
    write_folder(tmp_path / "val", small_images())
    for blocks in ("1", "20", "2000"):
        subprocess.run([program, "-b", blocks, "-cf", "../val.tar", "."], cwd=tmp_path / "val", check=True)
        assert check_tar(tmp_path / "val.tar") == 12


def tar_of_tars(folder: Path, damage: str | None = None) -> Path:
    content = {}
    for name in CLASSES:
        images = small_images((name,)) if (name, damage) != ("dog", "empty") else {"readme.txt": b""}
        inner = write_tar(folder / f"{name}.tar", {Path(k).name: v for k, v in images.items()})
        if (name, damage) == ("dog", "header"):
            overwritten(inner, headers(inner)[2], bytes(512))
        content[f"{name}.tar"] = inner.read_bytes()
        inner.unlink()
    return write_tar(folder / "val.tar", content)


def test_tar_of_tars(tmp_path: Path) -> None:
    assert check_tar(tar_of_tars(tmp_path)) == 12
    data = image_data(tmp_path)
    data.setup("validate")
    assert len(data.validation_set()) == 12
    assert data.num_classes == 3
    with pytest.raises(DataError, match=r"val.tar/dog.tar' is no complete .tar archive.*damaged"):
        check_tar(tar_of_tars(tmp_path, "header"))
    with pytest.raises(DataError, match=r"without an image: dog.tar"):
        check_tar(tar_of_tars(tmp_path, "empty"))


def test_list_of_another_archive_beside_a_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.data.readers import reader_image_in_tar

    write_tar(tmp_path / "val.tar", small_images())
    found = reader_image_in_tar.extract_tarinfos
    monkeypatch.setattr(
        reader_image_in_tar, "extract_tarinfos", lambda *args, **named: found(*args, **{**named, "cache_tarinfo": True})
    )
    image_data(tmp_path).setup("validate")  # timm writes its list
    write_tar(tmp_path / "val.tar", small_images(each=6))
    with pytest.raises(DataError, match=r"holds 18 images, but timm found 12.*_tarinfos.pickle"):
        image_data(tmp_path).setup("validate")


def test_links_to_a_folder_above(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", small_images())
    (tmp_path / "val/dog/up").symlink_to("..")
    (tmp_path / "val/dog/again").symlink_to("..")
    with pytest.raises(DataError, match=r"dog/again' is a link to '.*val', a folder that it lies in"):
        image_data(tmp_path).setup("validate")


def test_link_to_the_folder_of_the_root(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", small_images())
    (tmp_path / "val/dog/root").symlink_to("/")
    with pytest.raises(DataError, match=r"dog/root' is a link to '/'"):
        check_folder(tmp_path / "val")


def test_links_to_other_folders_and_files_pass(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", small_images())
    (tmp_path / "val").mkdir()
    for name in CLASSES:
        (tmp_path / "val" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "val/cat/more.jpg").symlink_to("0.jpg")
    data = image_data(tmp_path)
    data.setup("validate")
    assert len(data.validation_set()) == 13


def test_pipe_in_place_of_an_image(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", small_images())
    os.mkfifo(tmp_path / "val/dog/pipe.jpg")
    with pytest.raises(DataError, match=r"dog/pipe.jpg' is no regular file"):
        image_data(tmp_path, verify_up_to=0).setup("validate")


def test_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "val", small_images())
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"val/dog' cannot be read \(Permission denied\)"):
        check_folder(tmp_path / "val")


def test_postscript_named_like_an_image_reaches_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = small_images()
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, format="EPS")
    write_folder(tmp_path / "val", {**images, "dog/9.png": stream.getvalue()})

    def started(*args: object, **named: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "check_call", started)
    with pytest.raises(DataError, match=r"dog/9.png \(cannot identify image file"):
        image_data(tmp_path).setup("validate")
