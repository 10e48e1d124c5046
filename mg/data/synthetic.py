"""Clips with real image content for when no video can be downloaded: photographs with simulated camera motion.

The photographs come with the scikit-image wheel. They pan, zoom and rotate at natural speeds, and in some clips an
object, a soft-edged piece of another photograph, passes in front. No photograph in a test clip appears in a train clip,
whole or in part.
"""

import difflib
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

from mg.data.clip_folder import finish, is_complete, write_csv
from mg.data.errors import DataError
from mg.data.transforms import resize_short_side
from mg.data.video import read_image, write_image, write_video
from mg.settings import require

# What the photographs show, as captions have it.
_TRAIN_SUBJECTS = {
    "astronaut.png": "an astronaut",
    "rocket.jpg": "a rocket",
    "retina.jpg": "a retina",
    "hubble_deep_field.jpg": "galaxies",
    "ihc.png": "stained tissue",
    "motorcycle_left.png": "a motorcycle",
    "motorcycle_right.png": "a motorcycle",
    "brick.png": "a brick wall",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "moon.png": "the moon",
    "page.png": "a printed page",
    "text.png": "handwriting",
}
_TEST_SUBJECTS = {
    "chelsea.png": "a cat",
    "coffee.png": "a cup of coffee",
    "camera.png": "a photographer",
    "coins.png": "coins",
}
SUBJECTS = {**_TRAIN_SUBJECTS, **_TEST_SUBJECTS}
TRAIN_PHOTOGRAPHS, TEST_PHOTOGRAPHS = tuple(_TRAIN_SUBJECTS), tuple(_TEST_SUBJECTS)

MOTIONS = ("pan", "zoom", "rotation", "pan and zoom", "object", "pan and object")
# Where a camera moves to, by eighths of a turn; rows of a picture count downwards.
_DIRECTIONS = ("right", "right and down", "down", "left and down", "left", "left and up", "up", "right and up")

# Of what is drawn and how it is described: raise it with any change of either, so that old folders are rebuilt.
_VERSION = 2


@dataclass(frozen=True)
class ClipSettings:
    """What the clips are like; the same settings give the same pixels.

    Attributes:
        size: height and width in pixels, even.
        num_frames: frames per clip.
        fps: frames per second.
        train_clips: number of train clips.
        test_clips: number of test clips.
        seed: for all random choices.
        motions: motions that clips rotate through: pan | zoom | rotation | pan and zoom | object | pan and object.
        directions: number of directions of pans, spread evenly starting from the right; null allows any.
        closest: how many times larger than a clip the short side of a photograph may be; at least 1.1.
        photographs: photographs that train clips rotate through, by file name; null uses all train photographs.
    """

    size: int = 128
    num_frames: int = 24
    fps: float = 12.0
    train_clips: int = 32
    test_clips: int = 8
    seed: int = 0
    motions: list[str] = field(default_factory=lambda: list(MOTIONS))
    directions: int | None = None
    closest: float = 2.2
    photographs: list[str] | None = None

    def __post_init__(self):
        require(self.size >= 16 and self.size % 2 == 0, self, "size", "even and at least 16")
        for name, least in (("num_frames", 1), ("train_clips", 0), ("test_clips", 0), ("seed", 0)):
            require(getattr(self, name) >= least, self, name, f"at least {least}")
        require(self.fps > 0, self, "fps", "above 0")
        for name, known in (("motions", MOTIONS), ("photographs", TRAIN_PHOTOGRAPHS)):
            chosen = getattr(self, name)
            if chosen is not None and not chosen:
                raise DataError(f"{name} is empty; it must have some of {', '.join(known)}")
            for value in chosen or []:
                if value not in known:
                    near = difflib.get_close_matches(value, known, 1, cutoff=0)[0]
                    raise DataError(f"{name} has {value!r}, which there is not; did you mean {near!r}?")
        if self.photographs is not None and len(set(self.photographs)) < 2 and any("object" in m for m in self.motions):
            raise DataError("photographs must be at least two where motions have an object, which is of another one")
        require(self.directions is None or self.directions >= 1, self, "directions", "at least 1, or null")
        require(self.closest >= 1.1, self, "closest", "at least 1.1")


def read_photograph(name: str) -> np.ndarray:
    """A photograph from inside the installed scikit-image package -> uint8 RGB (H, W, 3), grey ones too."""
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise DataError("the photographs come with scikit-image, which is not installed: pip install scikit-image")
    return read_image(Path(package.origin).parent / "data" / name)


def make_images(output_dir: Path) -> bool:
    """Write the train photographs as output_dir/images/*.png and list them in output_dir/images.csv (path, caption).

    Returns:
        False if they already existed.
    """
    output_dir = Path(output_dir)
    manifest = {"version": _VERSION, "photographs": list(TRAIN_PHOTOGRAPHS)}
    if is_complete(output_dir / "images.json", manifest):
        return False
    rows = []
    for photograph in TRAIN_PHOTOGRAPHS:
        name = f"images/{Path(photograph).stem}.png"
        write_image(output_dir / name, read_photograph(photograph))
        rows.append((name, SUBJECTS[photograph]))
    write_csv(output_dir / "images.csv", ("path", "caption"), rows)
    finish(output_dir / "images.json", manifest, ["images.csv", *(name for name, _ in rows)])
    return True


def make_clips(output_dir: Path, settings: ClipSettings) -> bool:
    """Write output_dir/videos/*.mp4 and list them in train.csv and test.csv (video, caption).

    Returns:
        False if they already existed.
    """
    output_dir = Path(output_dir)
    manifest = {"version": _VERSION, **asdict(settings)}
    if is_complete(output_dir / "clips.json", manifest):
        return False
    files = []
    for split, count, photographs in (
        ("train", settings.train_clips, tuple(settings.photographs or TRAIN_PHOTOGRAPHS)),
        ("test", settings.test_clips, TEST_PHOTOGRAPHS),
    ):
        rows = []
        for number in range(count):
            frames, caption = draw_clip(photographs, number, settings)
            name = f"videos/{split}_{number:03d}.mp4"
            write_video(output_dir / name, frames, settings.fps)
            rows.append((name, caption))
        write_csv(output_dir / f"{split}.csv", ("video", "caption"), rows)
        files += [f"{split}.csv", *(name for name, _ in rows)]
    finish(output_dir / "clips.json", manifest, files)
    return True


def draw_clip(photographs: tuple[str, ...], number: int, settings: ClipSettings) -> tuple[np.ndarray, str]:
    """Clip `number` made from `photographs` -> uint8 RGB (T, size, size, 3), and its caption.

    Photographs and motions rotate, so that even a few clips show many of both. The caption names the subject and the
    camera's movement: "a rocket, the camera moves left and zooms in".
    """
    split = 0 if set(photographs) <= set(TRAIN_PHOTOGRAPHS) else 1
    rng = np.random.default_rng((settings.seed, split, number))
    photograph = photographs[number % len(photographs)]
    # Each round over the photographs shifts the motions by one, so that new pairs come up.
    motion = settings.motions[(number + number // len(photographs)) % len(settings.motions)]
    clip, movement = _move_camera(read_photograph(photograph), motion, settings, rng)
    caption = f"{SUBJECTS[photograph]}, the camera {movement}"
    if "object" in motion:
        others = [name for name in photographs if name != photograph]
        other = others[int(rng.integers(len(others)))]
        clip = _pass_in_front(clip, read_photograph(other), settings, rng)
        caption += f", a piece of {SUBJECTS[other]} passes in front"
    return np.clip(np.rint(clip), 0, 255).astype(np.uint8), caption


def _move_camera(
    photograph: np.ndarray, motion: str, settings: ClipSettings, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """Look at a photograph through a moving window -> float32 (T, size, size, 3) in 0..255, and how it moves."""
    size, middle = settings.size, (settings.num_frames - 1) / 2
    scale = size / 128  # the speeds below are for 128 pixels
    pan, zoom, turn = 0.0, 0.0, 0.0
    if "pan" in motion:
        pan = rng.uniform(0.5, 1.5) * scale  # pixels per frame
    if "zoom" in motion:
        zoom = rng.uniform(0.004, 0.01) * rng.choice((-1, 1))  # of the size, per frame
    if motion == "rotation":
        turn = np.deg2rad(rng.uniform(0.4, 1.0) * rng.choice((-1, 1)))  # per frame
    if motion == "object":
        pan = rng.uniform(0.1, 0.3) * scale  # a hand-held camera is never quite still

    # First shrink the photograph with an area filter to the scale of the widest view, so that the warp never shrinks.
    widest = abs(zoom) * middle
    corner = np.sqrt(2) if turn else 1.0
    needed = size * corner + 2 * pan * middle + 4
    short = int(np.ceil(max(needed, size * rng.uniform(1.1, settings.closest))))
    photograph = resize_short_side(photograph[None], short)[0].astype(np.float32)
    height, width = photograph.shape[:2]

    # Where the window's centre may be, so that no view leaves the photograph.
    margin_y, margin_x = min(needed, height) / 2, min(needed, width) / 2
    centre = np.array([rng.uniform(margin_x, width - margin_x), rng.uniform(margin_y, height - margin_y)])
    turns = rng.uniform(0, 1)
    if settings.directions is not None:
        turns = np.floor(turns * settings.directions) / settings.directions
    direction = 2 * np.pi * turns
    step = pan * np.array([np.cos(direction), np.sin(direction)])

    frames = []
    for i in range(settings.num_frames):
        time = i - middle
        view, angle = np.exp(zoom * time - widest), turn * time  # view: photograph pixels per clip pixel, at most 1
        matrix = view * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        offset = centre + step * time - 0.5 - matrix @ np.full(2, (size - 1) / 2)
        frames.append(_warp(photograph, np.column_stack([matrix, offset]), size))
    return np.stack(frames), _movement(turns if "pan" in motion else None, zoom, turn)


def _movement(pan: float | None, zoom: float, turn: float) -> str:
    """What a camera does, in words.

    Args:
        pan: where it moves to, in turns from the right towards below; None for nowhere.
        zoom: above 0 if ever more is seen.
        turn: above 0 if it turns clockwise.
    """
    said = []
    if pan is not None:
        said.append(f"moves {_DIRECTIONS[round(pan * len(_DIRECTIONS)) % len(_DIRECTIONS)]}")
    if zoom:
        said.append("zooms out" if zoom > 0 else "zooms in")
    if turn:
        said.append("turns clockwise" if turn > 0 else "turns counterclockwise")
    return " and ".join(said) or "hardly moves"


def _warp(image: np.ndarray, window_to_image: np.ndarray, size: int) -> np.ndarray:
    """Sample a size x size window: cubic, with float coordinates (warpAffine rounds them to 1/32)."""
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    (a, b, x), (c, d, y) = window_to_image.astype(np.float32)
    map_x, map_y = a * columns + b * rows + x, c * columns + d * rows + y
    return cv2.remap(image, map_x, map_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)


def _pass_in_front(
    clip: np.ndarray, photograph: np.ndarray, settings: ClipSettings, rng: np.random.Generator
) -> np.ndarray:
    """Lay a soft-edged ellipse of `photograph` over the clip, crossing it in a straight line."""
    size, middle = settings.size, (settings.num_frames - 1) / 2
    radii = size * rng.uniform(0.12, 0.22, size=2)
    patch_size = int(2 * np.ceil(radii.max()) + 8)
    photograph = resize_short_side(photograph[None], int(patch_size * rng.uniform(1.2, 3)))[0].astype(np.float32)
    top = int(rng.integers(photograph.shape[0] - patch_size + 1))
    left = int(rng.integers(photograph.shape[1] - patch_size + 1))
    patch = photograph[top : top + patch_size, left : left + patch_size]
    rows, columns = np.mgrid[:patch_size, :patch_size] - (patch_size - 1) / 2
    distance = 1 - np.hypot(columns / radii[0], rows / radii[1])  # 1 at the centre, 0 on the edge
    mask = np.clip(0.5 + distance * radii.min() / 3, 0, 1)[..., None]  # an edge about three pixels wide
    layer = np.dstack([patch * mask, mask]).astype(np.float32)  # premultiplied, to keep the edge clean

    direction = rng.uniform(0, 2 * np.pi)
    speed = rng.uniform(0.8, 2.0) * size / 128  # pixels per frame
    step = speed * np.array([np.cos(direction), np.sin(direction)])
    centre = size * rng.uniform(0.35, 0.65, size=2)
    out = np.empty_like(clip)
    for i in range(settings.num_frames):
        offset = (patch_size - 1) / 2 - (centre + step * (i - middle))
        rows, columns = np.mgrid[:size, :size].astype(np.float32)
        moved = cv2.remap(
            layer,
            columns + np.float32(offset[0]),
            rows + np.float32(offset[1]),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(0, 0, 0, 0),
        )
        out[i] = clip[i] * (1 - moved[..., 3:]) + moved[..., :3]
    return out
