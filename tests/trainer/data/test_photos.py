"""A person's folder of photos, as it is: pixels, what is left out and said, the split, the classes, whole runs."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import socket
import sys
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crl_diffusion import cli
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data import folder as folder_reader
from crl_diffusion.data import image_files
from crl_diffusion.data.folder import ImageTree, read_folder, train_and_held_out
from crl_diffusion.data.image_files import Unreadable, read_square
from crl_diffusion.data.split import split
from crl_diffusion.errors import OptionError
from crl_diffusion.training.plan import resolve
from helpers.image_folders import Traps, folder_with_every_trap, load, noise, write_photos, write_tree
from helpers.permissions import permissions_hold
from helpers.processes import forked
from helpers.trainer_runs import SHORT, options, require_one_line
from PIL import Image, features

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
HEIF = importlib.util.find_spec("pillow_heif") is not None
LOSSY = {".jpg", ".jpeg", ".jfif", ".heic"}
QUICK: dict[str, Any] = {**SHORT, "tasks": 0, "model": "mlp", "image_size": 8, "steps": 2, "pool": 1, "pool_steps": 1}


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> Traps:
    """Not to be written to."""
    return folder_with_every_trap(tmp_path_factory.mktemp("photos") / "holiday photos", HEIF)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line on stderr of `train` on a folder of images that it refuses."""

    def line(root: Path, *parts: str, **settings: Any) -> str:
        words = ["train", "--method", "fine-tune", "--data", "folder", "--data-root", str(root)]
        words += [*options({"out": root.parent / "refused", **QUICK, **settings})]
        assert cli.main(words) == 2
        said = capsys.readouterr().err.splitlines(keepends=True)
        errors = "".join(line for line in said if not line.startswith("decoding "))
        require_one_line(errors, *parts)
        return errors

    return line


# Pixels


def quarters(pixels: torch.Tensor) -> np.ndarray:
    """Colours (4, 3) in the middle of the quarters of one image, (1, 3, 8, 8)."""
    means = pixels[0].double().unflatten(1, (2, 4)).unflatten(3, (2, 4))[:, :, 1:3, :, 1:3].mean((2, 4))
    return means.flatten(1).T.numpy()


def test_every_photo_is_the_right_way_up_and_on_white(traps: Traps) -> None:
    assert traps.total == 40
    for path, corners in traps.corners.items():
        tolerance = 12 if Path(path).suffix.lower() in LOSSY or path == "red cats/really a jpeg.png" else 1
        read = quarters(read_square(str(traps.root / path), 8).pixels)
        np.testing.assert_allclose(read, corners, atol=tolerance, err_msg=path)


def test_every_file_without_pixels_has_a_reason(traps: Traps) -> None:
    for path, reason in traps.unreadable.items():
        if reason != "a link to nothing":  # that is found before files are opened
            with pytest.raises(Unreadable, match=reason) as caught:
                read_square(str(traps.root / path), 8)
            assert "\n" not in str(caught.value)


def test_the_data_set_has_each_readable_photo_once_with_its_class(traps: Traps) -> None:
    data = load("folder", traps.root, image_size=8, skip_unreadable=True)
    assert data.class_names == traps.classes
    expected = [
        (traps.classes.index(unicodedata.normalize("NFC", Path(path).parts[0])), *corners[3])
        for path, corners in traps.corners.items()
    ]
    read = [
        (int(label), *quarters(pixels[None])[3])
        for part in (data.train, data.test)
        for pixels, label in zip(part.pixels, part.labels, strict=True)
    ]
    assert len(read) == len(expected)
    np.testing.assert_allclose(np.sort(read, axis=0), np.sort(expected, axis=0), atol=12)
    counts = [sum(int((part.labels == c).sum()) for part in (data.train, data.test)) for c in range(3)]
    assert counts == np.bincount([label for label, *_ in expected]).tolist()


def test_what_was_left_out_is_said_in_a_line_each(traps: Traps) -> None:
    notes = read_folder(traps.root, 8, skip_unreadable=True).notes
    assert not any("\n" in note for note in notes)
    text = "\n".join(notes)
    for part in (
        "one in 5 of each class, are held out",
        "files that are no images and are passed over: 2 .mov, 1 .txt and 1 .jpg",  # a pipe is no file
        "images that lie in no class's folder and are passed over: 1",
        "listed or that holds the data: 3",
        f"{len(traps.unreadable)} of 40 images cannot be read and are left out: ",
        "several frames or pages: 1; the first one",
        *(repr(path) for path in traps.unreadable),
        *traps.unreadable.values(),
    ):
        assert part in text


def test_all_unreadable_files_are_named_in_one_error(traps: Traps, refused: Callable[..., str]) -> None:
    said = refused(traps.root, f"{len(traps.unreadable)} of 40 images cannot be read", "give --skip-unreadable")
    for path, reason in traps.unreadable.items():
        assert repr(path) in said
        assert reason in said
    for path in traps.corners:
        assert repr(path) not in said


def test_a_long_list_of_unreadable_files_is_in_a_file(tmp_path: Path, refused: Callable[..., str]) -> None:
    root = tmp_path / "photos"
    write_photos(root, {"a": 20, "b": 3})
    for i in range(15):
        (root / "a" / f"{i}.png").write_bytes(b"")
    listed = root / ".crl-diffusion" / "unreadable.txt"
    said = refused(root, "15 of 23 images", "and 3 more, all of them in", repr(str(listed)), "empty")
    assert said.count(".png'") == 12
    assert len(listed.read_text().splitlines()) == 15
    data = load("folder", root, image_size=8, skip_unreadable=True)  # the 8 readable ones are split
    assert data.train.labels.tolist() == [0, 0, 0, 1]
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    (root / "b" / "1.png").write_bytes(b"")
    with pytest.raises(OptionError, match=r"there are too few images of b in "):
        load("folder", root, image_size=8, skip_unreadable=True)
    for i in range(20):
        (root / "a" / f"{i}.png").write_bytes(bytes([i]))
        (root / "b" / f"{i % 3}.png").write_bytes(b"none" * i)
    with pytest.raises(OptionError, match=r"23 of 23 images cannot be read"):  # with nothing to train on
        load("folder", root, image_size=8, skip_unreadable=True)


@pytest.mark.parametrize("layout", ["classes", "parts"])
def test_one_copy_serves_every_way_to_name_the_folder(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos"
    if layout == "classes":
        write_photos(root, {"a": 6, "b": 4})
        (root / "a" / "1.png").write_bytes(b"")
    else:
        write_tree(root, ("a", "b"))
        (root / "train" / "a" / "1.png").write_bytes(b"")
    monkeypatch.chdir(root)
    (tmp_path / "link").symlink_to(root)
    ways = (Path("."), root, Path("../photos"), Path("../photos/../photos"), tmp_path / "link")
    first, *others = (load("folder", way, image_size=8, skip_unreadable=True) for way in ways)
    for other in others:
        assert (other.name, other.notes) == (first.name, first.notes)
        assert torch.equal(other.train.pixels, first.train.pixels)
        assert torch.equal(other.test.pixels, first.test.pixels)
    assert capsys.readouterr().err.count("decoding") == 1


def test_heif_without_its_package_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "formats", lambda: ("JPEG", "PNG"))
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(Unreadable, match="pip install pillow-heif"):
        read_square(str(tmp_path / "phone.heic"), 8)


def test_too_large_images_are_refused_and_jpegs_are_decoded_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small limit, which takes no memory: what matters is what is decoded."""
    smooth = np.linspace(0, 255, 480, dtype=np.uint8)
    photo = Image.fromarray(np.stack([np.tile(smooth, (320, 1))] * 3, -1))
    for name in ("photo.jpg", "photo.png"):
        photo.save(tmp_path / name)
    whole = read_square(str(tmp_path / "photo.jpg"), 8).pixels.double()
    decoded = []
    monkeypatch.setattr(image_files, "LARGEST", 20_000)
    monkeypatch.setattr(image_files, "_upright", lambda image: decoded.append(image.size) or image)
    smaller = read_square(str(tmp_path / "photo.jpg"), 8).pixels.double()
    assert decoded == [(60, 40)]  # an eighth
    assert (smaller - whole).abs().max() <= 3
    with pytest.raises(Unreadable, match="480 x 320 pixels, more than 20,000"):
        read_square(str(tmp_path / "photo.png"), 8)
    with pytest.raises(Unreadable, match=r"\d+ x \d+ pixels, more than 20,000"):
        read_square(str(tmp_path / "photo.jpg"), 300)  # at a half it is still too large
    assert len(decoded) == 1


@pytest.mark.parametrize("side", [24, 37, 100])
def test_large_images_have_the_same_pixels_row_by_row(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(noise(side, 1, side, side, 3)[0]).save(tmp_path / "photo.png")
    at_once = [read_square(str(tmp_path / "photo.png"), size).pixels for size in (5, 8, 24)]
    monkeypatch.setattr(image_files, "LARGE", 100)
    by_row = [read_square(str(tmp_path / "photo.png"), size).pixels for size in (5, 8, 24)]
    assert all(map(torch.equal, at_once, by_row))


def test_damaged_files_are_read_or_have_a_reason_of_one_line(traps: Traps, tmp_path: Path) -> None:
    generator, file = np.random.default_rng(0), tmp_path / "damaged"
    shapes, reasons = set(), set()
    for path in traps.corners:
        content = np.frombuffer((traps.root / path).read_bytes(), np.uint8)
        for _ in range(8):
            damaged = content.copy()
            damaged[generator.integers(0, min(len(content), 400), 6)] = generator.integers(0, 256, 6)
            file.write_bytes(damaged.tobytes())
            try:
                shapes.add(read_square(str(file), 8).pixels.shape)
            except Unreadable as error:
                reasons.add(str(error))
    assert shapes == {(1, 3, 8, 8)}
    assert len(reasons) > 3
    assert not any("\n" in reason for reason in reasons)


def test_an_opaque_alpha_channel_changes_no_pixel(tmp_path: Path) -> None:
    pixels = noise(0, 1, 16, 16, 3)[0]
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "opaque.png")
    plain, opaque = (read_square(str(tmp_path / f"{name}.png"), 16).pixels for name in ("plain", "opaque"))
    assert torch.equal(plain, opaque)
    assert torch.equal(plain[0].permute(1, 2, 0), torch.from_numpy(pixels))


# Which files


def test_an_ordinary_tree_is_listed_as_torchvision_lists_it(tmp_path: Path) -> None:
    """So the names of data sets and the order of images, in the records of earlier runs, stay as they are."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    for part in ("train", "test"):
        for path in (
            "b/1.png",
            "b/d/1.JPG",
            "b/d-e/1.png",
            "b/d/0.tif",
            "B/2.jpeg",
            "a b/10.webp",
            "a b/9.bmp",
            "ü/x.ppm",
        ):
            (tmp_path / part / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / part / path).write_text(path)
    tree = ImageTree(tmp_path, "--data folder", *train_and_held_out(tmp_path))
    for part in ("train", "test"):
        names, numbers = find_classes(str(tmp_path / part))
        assert list(tree.classes) == names
        assert tree.parts[part] == make_dataset(str(tmp_path / part), numbers, extensions=IMG_EXTENSIONS)
    assert tree.digest()[:8] == "c56d0b97"  # of the version before this listing


@pytest.mark.parametrize("place", ["train/a/up", "train/a/deep/er/up", "train/up", "train/a/other", "train/a/self"])
def test_links_to_folders_give_no_image_a_second_time(place: str, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    write_tree(root, ("a", "b"))
    for target in (root, tmp_path, root / "train", root / "train" / "b"):
        link = root / place
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(link if place.endswith("self") else target, target_is_directory=True)
        data = load("folder", root, image_size=8, skip_unreadable=place.endswith("self"))
        assert data.class_names == ("a", "b")
        assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        link.unlink()


@pytest.mark.parametrize(
    ("link", "target"), [("train/a/more", "test/b"), ("test/b/more", "train"), ("train/c", "test/a")]
)
def test_no_link_brings_images_of_one_part_into_the_other(link: str, target: str, tmp_path: Path) -> None:
    write_tree(tmp_path, ("a", "b"))
    before = load("folder", tmp_path, image_size=8)
    (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    data = load("folder", tmp_path, image_size=8)
    assert data.class_names == ("a", "b")
    assert torch.equal(data.train.labels, before.train.labels)
    assert torch.equal(data.test.labels, before.test.labels)
    assert "that is listed or that holds the data: 1" in "\n".join(data.notes)


@pytest.mark.parametrize("target", ["nowhere", "test", "train"])
def test_a_test_part_that_is_a_link_to_nothing_or_to_train_is_refused(
    target: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    root = tmp_path / "photos"
    write_tree(root, ("a", "b"))
    shutil.rmtree(root / "test")
    (root / "test").symlink_to(target, target_is_directory=True)
    refused(root, "are one folder" if target == "train" else "'test' in", "some of the others are held out")


def test_links_to_other_places_are_followed_once(tmp_path: Path) -> None:
    write_tree(tmp_path / "photos", ("a", "b"))
    write_photos(tmp_path / "elsewhere", {"c": 4, "d": 2})
    train = tmp_path / "photos" / "train"
    for part in ("train", "test"):
        (tmp_path / "photos" / part / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (train / "a" / "more").symlink_to(tmp_path / "elsewhere" / "d")
    (train / "b" / "more").symlink_to(tmp_path / "elsewhere" / "d")
    (tmp_path / "elsewhere" / "d" / "round").symlink_to(train / "a")
    data = load("folder", tmp_path / "photos", image_size=8)
    assert data.train.labels.bincount().tolist() == [5, 3, 4]
    assert "that is listed or that holds the data: 2" in "\n".join(data.notes)


def test_folders_and_files_that_may_not_be_read_are_named(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rights are pretended: to root, as whom tests may run, everything is allowed."""
    root = tmp_path / "photos"
    write_photos(root, {"a": 4, "b": 3, "c": 3})
    forbidden = {str(root / "c")}

    def allowed(call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(path: Any, *arguments: Any, **named: Any) -> Any:
            if str(path) in forbidden:
                raise PermissionError(13, "Permission denied", path)
            return call(path, *arguments, **named)

        return guarded

    monkeypatch.setattr(os, "scandir", allowed(os.scandir))
    monkeypatch.setattr(Image, "open", allowed(Image.open))
    refused(root, f"the image {str(root / 'c')!r} cannot be read (a folder; Permission denied)")
    forbidden.add(str(root / "a" / "1.png"))
    forbidden.remove(str(root / "c"))
    refused(root, f"the image {str(root / 'a' / '1.png')!r} cannot be read (Permission denied)")
    data = load("folder", root, image_size=8, skip_unreadable=True)
    assert sorted([*data.train.labels.tolist(), *data.test.labels.tolist()]) == [0] * 3 + [1] * 3 + [2] * 3
    forbidden.add(str(root / "b"))
    refused(root, f"the image {str(root / 'b')!r} cannot be read")


@pytest.mark.parametrize("path", ["", "a", "a/1.png", "train", "test/b"])
def test_what_this_user_may_not_read_is_one_line(path: str, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    if path in ("train", "test/b"):
        write_tree(root, ("a", "b"))
    else:
        write_photos(root, {"a": 4, "b": 3})
    (root / path).chmod(0)

    def read() -> str:
        try:
            return f"{len(load('folder', root, image_size=8).train)} images"
        except (OptionError, OSError) as error:  # the command line prints either in one line
            return str(error)

    with permissions_hold():
        said = read()
    assert "Permission denied" in said
    assert repr(str(root / path)) in said
    assert "\n" not in said


def test_a_file_that_is_deleted_while_the_folder_is_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path, {"a": 4, "b": 4})
    gone, square = tmp_path / "b" / "3.png", read_square

    def deleted(file: str, size: int) -> image_files.Picture:
        gone.unlink(missing_ok=True)
        return square(file, size)

    monkeypatch.setattr(folder_reader, "read_square", deleted)
    data = load("folder", tmp_path, image_size=8, skip_unreadable=True)
    assert "'b/3.png' (No such file or directory)" in "\n".join(data.notes)
    monkeypatch.undo()
    again = load("folder", tmp_path, image_size=8)
    assert (len(again.train), again.name) == (len(data.train), data.name)


def test_pipes_sockets_and_devices_are_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening one would wait for ever."""
    write_photos(tmp_path, {"a": 3, "b": 3})
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "linked.png").symlink_to("pipe.png")
    (tmp_path / "a" / "zero.png").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path / "b")  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
    data = load("folder", tmp_path, image_size=8)
    assert len(data.train) + len(data.test) == 6
    assert "files that are no images and are passed over: 4 .png" in data.notes


def test_several_large_images_take_the_memory_of_one(tmp_path: Path) -> None:
    """By the system's account, of 12 images of 64 MiB, as Pillow keeps them, read by 12 threads."""
    if sys.platform != "linux":
        pytest.skip(f"ru_maxrss is in KiB on Linux; this is {sys.platform}")
    Image.new("L", (4100, 4100)).save(tmp_path / "large.tif")

    def peak() -> str:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with ThreadPoolExecutor(12) as threads:
            list(threads.map(lambda _: read_square(str(tmp_path / "large.tif"), 8), range(12)))
        return str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    assert int(forked(peak)) < 8 * 65_000  # KiB: two images, a band of one as floats, and what is not given back


def test_no_reader_but_those_of_the_formats_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a file is called: Pillow would start Ghostscript for PostScript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript would start"))
    image = Image.fromarray(noise(0, 1, 128, 128, 3)[0])
    for name in ("EPS", "PDF", "ICNS", "ICO", "JPEG2000", "TGA", "PCX", "SGI", "DDS"):
        try:
            image.save(tmp_path / f"{name}.png", format=name)
        except (KeyError, OSError):  # this Pillow was built without a codec
            continue
        with pytest.raises(Unreadable, match="no image, or in another format than"):
            read_square(str(tmp_path / f"{name}.png"), 8)


def test_avif_is_read(tmp_path: Path) -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow was built without libavif")
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "photo.avif", quality=100)
    read = read_square(str(tmp_path / "photo.avif"), 8).pixels[0].double().mean((1, 2))
    assert (read - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 6


@pytest.mark.parametrize(
    ("folders", "parts"),
    [
        ((), ["holds no folders", "one for each class"]),
        (("a", "b"), ["there are no images of a and b", "delete the empty folders"]),
        (("test/a", "test/b"), ["holds a folder 'test'", "no folder 'train'"]),
        (("mine/train/a", "mine/test/a"), ["one folder deeper", "mine'; point --data-root at it"]),
        (("mine/a", "mine/b"), ["one folder deeper", "mine'; point --data-root at it"]),
        (("train",), ["holds no folders; expected one for each class"]),
    ],
)
def test_a_folder_of_another_form_is_refused(
    folders: tuple[str, ...], parts: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    root = tmp_path / "photos"
    for folder in ("", *folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
    refused(root, *parts)
    refused(tmp_path / "nowhere", "there is no folder", "name it with --data-root")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_photos(tmp_path, {"bus": 3, "test": 3, "train": 3})
    assert load("folder", tmp_path, image_size=8).class_names == ("bus", "test", "train")


# Names


def test_names_that_differ_only_in_unicodes_form_are_one_class(tmp_path: Path, refused: Callable[..., str]) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = tmp_path / "photos"
    write_tree(root, ("a", composed))
    (root / "test" / composed).rename(root / "test" / decomposed)
    if not (root / "train" / composed).exists() or (root / "train" / decomposed).exists():
        pytest.skip("this file system takes both of Unicode's forms for one name")
    data = load("folder", root, image_size=8)
    assert data.class_names == ("a", composed)
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    shutil.copytree(root / "train" / composed, root / "train" / decomposed)
    refused(root, "two folders in", "have the name 'café'", "'caf\\xe9'", "'cafe\\u0301'")


def test_names_that_differ_only_in_case_are_two_classes_and_said(tmp_path: Path) -> None:
    write_photos(tmp_path, {"Cat": 3, "dog": 3})
    if (tmp_path / "cat").exists():
        pytest.skip("this file system takes upper and lower case for one")
    shutil.copytree(tmp_path / "Cat", tmp_path / "cat")
    for file in (tmp_path / "cat").iterdir():
        Image.fromarray(noise(int(file.stem) + 70, 8, 8, 3)[0]).save(file)
    data = load("folder", tmp_path, image_size=8)
    assert data.class_names == ("Cat", "cat", "dog")
    assert "Cat and cat differ only in upper and lower case; they are 2 classes" in data.notes


def test_a_very_long_name_of_the_folder_is_cut_off(tmp_path: Path) -> None:
    root = tmp_path / ("é" * 120)  # 240 bytes
    write_photos(root, {"a": 3, "b": 3})
    name = load("folder", root, image_size=8).name
    assert name.startswith(f"folder-{'é' * 87}-")
    assert len(name) == len("folder-") + 87 + len("-12345678")


# The split


def write_bytes(root: Path, names: list[str]) -> list[str]:
    root.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (root / name).write_bytes(bytes([i, i // 256]))
    return [str(root / name) for name in names]


def test_the_split_depends_on_the_names_alone(tmp_path: Path) -> None:
    """One in five, whatever the order, the place and the other classes are."""
    names = [f"photo {i}.jpg" for i in range(40)]
    here, there = write_bytes(tmp_path / "a", names), write_bytes(tmp_path / "elsewhere" / "a", names[::-1])
    train, test = split([(f, 0) for f in here], str(tmp_path), ["a"], "--data folder")
    assert (len(train), len(test)) == (32, 8)
    assert sorted(train + test) == sorted((f, 0) for f in here)
    assert train == [entry for entry in [(f, 0) for f in here] if entry in train]  # in their original order
    others = write_bytes(tmp_path / "elsewhere" / "b", [f"{i}" for i in range(7)])
    for file in others:
        Path(file).write_bytes(b"other " + Path(file).name.encode())
    again = split([(f, 1) for f in others] + [(f, 0) for f in there], str(tmp_path / "elsewhere"), ["a", "b"], "")
    chosen = {Path(file).name for file, label in again[1] if label == 0}
    assert chosen == {Path(file).name for file, _ in test}
    assert {9, 11, 16, 35, 39} < {int(name.removeprefix("photo ").removesuffix(".jpg")) for name in chosen}  # for ever


def test_copies_and_links_of_an_image_come_to_one_part(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(10)]
    a, b = write_bytes(tmp_path / "a", names), write_bytes(tmp_path / "b", [f"b{i}.jpg" for i in range(10)])
    for i, file in enumerate(b[5:]):
        Path(file).write_bytes(b"other" + bytes([i]))  # the first five are copies of files of a
    files = [(f, 0) for f in a] + [(f, 1) for f in b]
    for i in range(10):
        os.symlink(a[i], tmp_path / "a" / f"link {i}.jpg")
        os.link(a[i], tmp_path / "a" / f"hard link {i}.jpg")
        shutil.copy(a[i], tmp_path / "b" / f"copy {i}.jpg")
        files += [(str(tmp_path / "a" / f"{kind} {i}.jpg"), 0) for kind in ("link", "hard link")]
        files += [(str(tmp_path / "b" / f"copy {i}.jpg"), 1)]
    train, test = split(files, str(tmp_path), ["a", "b"], "--data folder")
    assert len(train) + len(test) == 50
    contents = [{Path(file).read_bytes() for file, _ in part} for part in (train, test)]
    assert not contents[0] & contents[1]
    assert {label for _, label in train} == {label for _, label in test} == {0, 1}


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_class_that_is_too_small_for_two_parts_is_refused(
    n: int, tmp_path: Path, refused: Callable[..., str]
) -> None:
    root = tmp_path / "photos"
    write_photos(root, {"a": 3, "few": n, "c": 3})
    refused(root, "too few images of few" if n else "no images of few", "3 different ones" if n else "empty folders")
    write_photos(root / "few" / "more", {"": 3})
    data = load("folder", root, image_size=8)
    assert data.test.labels.bincount().tolist() == [2, 2, 2]
    shutil.rmtree(root / ".crl-diffusion")
    for file in (root / "few" / "more").iterdir():
        file.write_bytes((root / "a" / "0.png").read_bytes())  # as many files as before, but one image
    refused(root, "too few images of few") if n < 2 else load("folder", root, image_size=8)


def test_a_folder_train_without_a_test_part_is_split(tmp_path: Path) -> None:
    write_tree(tmp_path, ("a", "b"), n=10)
    given = load("folder", tmp_path, image_size=8)
    assert not given.notes
    shutil.rmtree(tmp_path / "test")
    data = load("folder", tmp_path, image_size=8)
    assert (len(data.train), len(data.test)) == (16, 4)
    assert data.notes[-1].startswith("there is no folder 'test': 4 of 20 images, one in 5 of each class")
    assert data.name != given.name
    before = {image.numpy().tobytes() for image in given.train.pixels}
    parts = [{image.numpy().tobytes() for image in part.pixels} for part in (data.train, data.test)]
    assert parts[0] | parts[1] == before
    assert not parts[0] & parts[1]


# Tasks


@pytest.mark.parametrize(
    ("classes", "asked", "tasks"),
    [
        (2, {}, (2, 1)), (3, {}, (3, 1)), (4, {}, (2, 2)), (5, {}, (5, 1)), (6, {}, (3, 2)), (7, {}, (7, 1)),
        (8, {}, (4, 2)), (9, {}, (9, 1)), (10, {}, (5, 2)), (11, {}, (5, 2)), (12, {}, (5, 2)),
        (1, {}, (1, 1)), (3, {"tasks": 1}, (1, 2)), (3, {"tasks": 2}, (2, 1)), (4, {"tasks": 2}, (2, 2)),
        (12, {"tasks": 3}, (3, 2)), (6, {"classes_per_task": 3}, (2, 3)), (7, {"classes_per_task": 2}, (3, 2)),
        (20, {"classes_per_task": 3}, (5, 3)), (3, {"tasks": 2, "classes_per_task": 2}, (2, 2)),
    ],
)  # fmt: skip
def test_tasks_fit_the_folder_where_they_are_not_given(
    classes: int, asked: dict[str, int], tasks: tuple[int, int], tmp_path: Path
) -> None:
    for c in range(classes):
        (tmp_path / f"class {c}").mkdir()
    config = resolve(RunConfig(method="fine-tune", data="folder", **asked), tmp_path)
    assert (config.tasks, config.classes_per_task) == tasks


@pytest.mark.parametrize("asked", [{"tasks": 4}, {"classes_per_task": 4}, {"tasks": 2, "classes_per_task": 2}])
def test_tasks_that_do_not_fit_are_refused(asked: dict[str, int], tmp_path: Path, refused: Callable[..., str]) -> None:
    root = tmp_path / "photos"
    write_photos(root, {"a": 3, "b": 3, "c": 3})
    refused(root, "--tasks is ", "--classes-per-task is ", "has 3 classes", **asked)


# Whole runs


def test_a_run_inside_the_folder_of_classes_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    write_photos(tmp_path, {"a": 3, "b": 3})
    refused(
        tmp_path / "a" / "..", "--out ", "lies in the folder of images", "give a place outside", out=tmp_path / "runs"
    )
    assert not (tmp_path / "runs").exists()


def run_words(command: str, root: Path, out: Path, *words: str) -> list[str]:
    return [command, *words, "--data", "folder", "--data-root", str(root), *options(QUICK), "--out", str(out)]


def test_photos_are_trained_on_compared_and_diagnosed(
    traps: Traps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "holiday photos"
    shutil.copytree(traps.root, root, symlinks=True, ignore=shutil.ignore_patterns("pipe.jpg", ".crl-diffusion"))
    (root / "red cats" / "dangling.jpg").unlink()
    for link in (root / "red cats" / "up", root / "red cats" / "dogs", root / "all"):
        link.unlink()
    monkeypatch.chdir(tmp_path)
    here, out, unreadable = Path("holiday photos"), Path("run"), len(traps.unreadable) - 1
    words = run_words("train", here, out, "--method", "fine-tune", "--skip-unreadable")
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert f"{unreadable} of 39 images cannot be read and are left out" in said
    assert "classes: 3 (mäuse, red cats and 犬), in 3 tasks of 1" in said
    record = json.loads((out / "config.json").read_text())
    assert record["run"]["skip_unreadable"] is True
    assert (record["run"]["tasks"], record["run"]["classes_per_task"]) == (3, 1)
    assert record["data_root"] == str(root)
    assert any("cannot be read and are left out" in note for note in record["data_notes"])

    # The same command again; another one.
    assert cli.main(words) == 0
    assert "is finished already" in capsys.readouterr().out
    without = [word for word in words if word != "--skip-unreadable"]
    assert cli.main(without) == 2
    require_one_line(capsys.readouterr().err, "holds another run (skip_unreadable True there, False asked for)")

    # A comparison passes on what was chosen.
    words = run_words("compare", here, Path("compared"), "--methods", "fine-tune", "--jobs", "1", "--skip-unreadable")
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("classes: 3 (mäuse, red cats and 犬), in 3 tasks of 1") == 1
    compared = json.loads(Path("compared", "fine-tune-seed0", "config.json").read_text())
    assert compared["run"] == record["run"]
    assert (compared["data_name"], compared["data_root"]) == (record["data_name"], record["data_root"])

    # Diagnosis finds the photos from anywhere, until they are moved or changed.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    diagnose = ["diagnose", str(tmp_path / "run"), "--samples", "48", "--timesteps", "500"]
    assert cli.main(diagnose) == 2
    require_one_line(capsys.readouterr().err, "--samples is 48, but there are only ")
    root.rename(elsewhere / root.name)
    assert cli.main(diagnose) == 2
    require_one_line(capsys.readouterr().err, f"were in {str(root)!r}, and there is no such folder", "--data-root")
    assert cli.main([*diagnose, "--data-root", root.name]) == 2
    assert "--samples is 48, but there are only " in capsys.readouterr().err
    (elsewhere / root.name / "犬" / "4.png").unlink()
    assert cli.main([*diagnose, "--data-root", root.name]) == 2
    assert "but the run was trained on " + record["data_name"] in capsys.readouterr().err
