"""Data sets for tests of reading: random images, folders of them, a person's folder of photos, a loader of any set."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data import tasks
from crl_diffusion.training.plan import resolve
from PIL import ExifTags, Image
from PIL.Image import Transpose


def load(name: str, root: Path, **settings: Any) -> tasks.Data:
    return tasks.load(resolve(RunConfig(method="fine-tune", data=name, **settings), root), root)  # type: ignore[arg-type]


def noise(seed: int, n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_tree(
    root: Path,
    classes: tuple[str, ...],
    n: int = 3,
    side: tuple[int, int] = (32, 32),
    held_out: str = "test",
    suffix: str = ".png",
) -> None:
    for part in ("train", held_out):
        for c, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(noise(100 * c + i, side[1], side[0], 3)).save(folder / f"{i}{suffix}")


def write_photos(root: Path, counts: dict[str, int]) -> None:
    """A folder of classes without parts: so many different images of each."""
    for c, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(noise(1000 * c + i, 8, 8, 3)).save(root / name / f"{i}.png")


# A person's folder

SIDE = 32
CORNERS = ((200, 30, 30), (30, 160, 30), (30, 30, 200))  # of every scene: upper left, upper right, lower left
STORED_AS = {  # how an upright image is stored for each value of EXIF's orientation
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}


class Traps(NamedTuple):
    """A folder of photos, and what must be read from it."""

    root: Path
    classes: tuple[str, ...]
    corners: dict[str, np.ndarray]  # by path in `root`: colours (4, 3) of the four quarters of each readable photo
    unreadable: dict[str, str]  # by path in `root`: a part of the reason

    @property
    def total(self) -> int:
        return len(self.corners) + len(self.unreadable)


def folder_with_every_trap(root: Path, heif: bool) -> Traps:
    """40 photos in three classes as people keep them, in a folder `root` that is made: every orientation, transparency,
    formats, names, damage, links, and what systems leave beside photos. `heif`: pillow-heif can be used."""
    unicode_class = unicodedata.normalize("NFD", "mäuse")  # as macOS writes it
    classes = ("red cats", unicode_class, "犬")
    for name in classes:
        (root / name).mkdir(parents=True)
    corners: dict[str, np.ndarray] = {}

    def scene(number: int) -> Image.Image:
        pixels = np.empty((SIDE, SIDE, 3), np.uint8)
        half = SIDE // 2
        for colour, (y, x) in zip((*CORNERS, (5 * number,) * 3), ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
            pixels[y * half : (y + 1) * half, x * half : (x + 1) * half] = colour
        return Image.fromarray(pixels)

    def turned(image: Image.Image, orientation: int) -> dict[str, Any]:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        return {"exif": exif.tobytes(), "image": image.transpose(STORED_AS[orientation]) if orientation > 1 else image}

    def put(path: str, number: int, image: Image.Image | None = None, *, last: int | None = None, **how: Any) -> None:
        """Save `image`, by default a scene; `last` is the grey of its lower right quarter, if it is another."""
        stored = how.pop("image", None) or image or scene(number)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        stored.save(root / path, **how)
        corners[path] = np.array([*CORNERS, (5 * number if last is None else last,) * 3])

    best = {"quality": 95, "subsampling": 0}
    for orientation in range(1, 9):
        put(f"red cats/IMG {orientation}.JPG", orientation, **best, **turned(scene(orientation), orientation))
    put("red cats/turned.png", 9, **turned(scene(9), 6))
    put("red cats/turned.webp", 10, lossless=True, **turned(scene(10), 8))
    put("red cats/turned.TIFF", 11, **turned(scene(11), 6))
    put("red cats/two pictures.jpg", 12, format="MPO", save_all=True, append_images=[scene(40)], **best)
    put("red cats/really a jpeg.png", 13, format="JPEG", **best)
    put("red cats/damaged exif.jpg", 14, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f", **best)

    def see_through(number: int) -> Image.Image:
        """The lower right quarter is black and transparent."""
        image = scene(number).convert("RGBA")
        image.paste((0, 0, 0, 0), (SIDE // 2, SIDE // 2, SIDE, SIDE))
        return image

    put(f"{unicode_class}/cut out.png", 15, see_through(15), last=255)
    put(f"{unicode_class}/cut out.webp", 16, see_through(16), last=255, lossless=True, exact=True)
    half_seen = see_through(17)
    half_seen.putalpha(half_seen.getchannel("A").point(lambda alpha: alpha or 128))
    put(f"{unicode_class}/half transparent.png", 17, half_seen, last=127)
    palette = Image.fromarray(np.kron([[0, 1], [2, 3]], np.ones((SIDE // 2,) * 2)).astype(np.uint8), "P")
    palette.putpalette([*CORNERS[0], *CORNERS[1], *CORNERS[2], 0, 0, 0])
    put(f"{unicode_class}/palette.png", 18, palette, last=255, transparency=3)
    put(f"{unicode_class}/palette.gif", 19, palette, last=255, transparency=3)
    put(f"{unicode_class}/moves.GIF", 20, save_all=True, append_images=[scene(40), scene(41)])
    put(f"{unicode_class}/one colour.png", 21, last=255, transparency=(105, 105, 105))
    for name, number, mode in (("grey", 22, "L"), ("grey cut out", 23, "LA")):
        grey = scene(number).convert("L")
        if mode == "LA":
            grey.putalpha(see_through(23).getchannel("A"))
        put(f"{unicode_class}/{name}.png", number, grey)
        values = np.array(scene(number).convert("L"))[[0, 0, -1, -1], [0, -1, 0, -1]]
        corners[f"{unicode_class}/{name}.png"] = np.repeat(
            [*values[:3], 255 if mode == "LA" else values[3]], 3
        ).reshape(4, 3)
    put(f"{unicode_class}/print.jpeg", 24, scene(24).convert("CMYK"), **best)
    put(f"{unicode_class}/{'long ' * 40}.bmp", 25)

    put("犬/2024/summer trip/day 1.ppm", 26)
    put("犬/2024/winter.jfif", 27, format="JPEG", **best)
    put('犬/it\'s "quoted" 🐕.png', 28)
    put("犬/CAPITALS.PNG", 29)
    put("犬/4.png", 30)
    (root / "犬" / "a copy of 4.png").write_bytes((root / "犬" / "4.png").read_bytes())
    os.symlink(root / "犬" / "4.png", root / "犬" / "a link to 4.png")
    for name in ("a copy of 4.png", "a link to 4.png"):
        corners[f"犬/{name}"] = corners["犬/4.png"]

    unreadable = {
        "red cats/dangling.jpg": "a link to nothing",
        "red cats/empty.jpg": "the file is empty",
        "red cats/page\n1.png": "no image, or in another format",
        f"{unicode_class}/cut short.jpg": "truncated",
        f"{unicode_class}/deep.png": "save it with 8 bits a channel",
        "犬/huge.png": "12,000 x 12,000 pixels",
        "犬/text.jpeg": "no image, or in another format",
    }
    os.symlink(root / "gone.jpg", root / "red cats" / "dangling.jpg")
    (root / "red cats" / "empty.jpg").touch()
    (root / "red cats" / "page\n1.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    content = (root / "red cats" / "IMG 1.JPG").read_bytes()
    (root / unicode_class / "cut short.jpg").write_bytes(content[:-30])
    Image.fromarray(np.arange(SIDE**2).reshape(SIDE, SIDE).astype(np.uint16)).save(root / unicode_class / "deep.png")
    Image.new("1", (12_000, 12_000)).save(root / "犬" / "huge.png")
    (root / "犬" / "text.jpeg").write_text("<html>Not found</html>")
    if heif:
        import pillow_heif

        pillow_heif.register_heif_opener()
        put("犬/phone.HEIC", 31, quality=100, chroma=444, **turned(scene(31), 6))
    else:
        (root / "犬" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
        unreadable["犬/phone.HEIC"] = "pip install pillow-heif"

    # What is no photo, and no class.
    hidden = (".git/1.png", "犬/.hidden.png", "犬/.ipynb_checkpoints/4-checkpoint.png")
    for path in ("__MACOSX/red cats/1.jpg", "@eaDir/1.jpg", *hidden):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        scene(35).save(root / path)
    for path in (".DS_Store", "犬/.DS_Store", "犬/Thumbs.db", "red cats/desktop.ini", "red cats/._IMG 1.JPG"):
        (root / path).write_bytes(b"\0\5\x16\7")
    for path in ("red cats/film.MOV", "red cats/second film.mov", "犬/notes.txt"):
        (root / path).write_bytes(b"no image")
    scene(36).save(root / "cover.png")
    os.mkfifo(root / "犬" / "pipe.jpg")
    os.symlink(root, root / "red cats" / "up", target_is_directory=True)
    os.symlink(root / "犬", root / "red cats" / "dogs", target_is_directory=True)
    os.symlink(root, root / "all", target_is_directory=True)
    names = tuple(unicodedata.normalize("NFC", name) for name in sorted(classes))
    return Traps(root, names, corners, unreadable)
