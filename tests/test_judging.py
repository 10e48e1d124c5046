"""How often captions are followed and how well first frames are kept, measured on clips with known answers."""

import json

import numpy as np
import pytest
from commands import run_here
from tiny_generation import Workplace

from mg.data.clip_folder import write_csv
from mg.data.transforms import to_video_tensor
from mg.data.video import write_video
from mg.generation.config import SchedulerSection
from mg.generation.judging import FILE, JudgeConfig, first_frames, heeded, judge, losses_of, psnrs

SIZE = (8, 16, 16)
CAPTIONS = ["a cat, it sits", "a cat, it runs", "a dog, it sits", "a dog, it runs"]


def grey(value: int, frames: int = 2) -> np.ndarray:
    return np.full((frames, 4, 4, 3), value, np.uint8)


def test_a_caption_is_followed_if_the_nearest_clip_has_it():
    known, of_known = [grey(0), grey(10), grey(100), grey(200)], ["black", "black", "grey", "white"]
    generated, captions = [grey(4), grey(90), grey(190), grey(20)], ["black", "grey", "white", "white"]
    found = heeded(psnrs(generated, known), captions, of_known)
    assert found.share == 3 / 4
    assert found.chance == pytest.approx((2 + 1 + 1 + 1) / 4 / 4)
    differences = np.array([[4, 10, 10, 180], [96, 80, 90, 10]])  # to the nearest of the caption, and of others
    np.testing.assert_allclose((found.own, found.others), -20 * np.log10(differences / 255).mean(1))


def test_the_same_clip_for_all_captions_is_right_by_chance():
    known = [grey(0), grey(100), grey(200)]
    found = heeded(psnrs([grey(90)] * 3, known), ["a", "b", "c"], ["a", "b", "c"])
    assert found.share == found.chance == pytest.approx(1 / 3)


@pytest.mark.parametrize(("caption", "who"), [("a", "all"), ("b", "none")])
def test_a_caption_of_all_clips_or_of_none_is_refused(caption, who):
    with pytest.raises(ValueError, match=f"^'{caption}' is the caption of {who} of 2 clips"):
        heeded(np.zeros((1, 2)), [caption], ["a", "a"])


def test_psnr_is_of_whole_clips_and_bounded():
    half = np.concatenate([grey(0, 1), grey(255, 1)])
    found = psnrs([grey(0), grey(51)], [grey(0), half])
    np.testing.assert_allclose(found[0], [100, -10 * np.log10(0.5)], atol=1e-9)
    np.testing.assert_allclose(found[1], [-20 * np.log10(0.2), -10 * np.log10((0.2**2 + 0.8**2) / 2)], atol=1e-9)


def test_first_frames_are_compared_with_the_reconstruction_and_later_ones_with_the_true_clip():
    true = np.concatenate([grey(0, 1), grey(51, 2)])
    moves, stands = np.concatenate([grey(5, 1), grey(51, 2)]), grey(5, 3)
    found = first_frames([moves, stands], [true, true], [grey(5, 1), grey(5, 1)])
    assert found.kept == 100
    assert found.still == pytest.approx(-20 * np.log10(46 / 255))
    assert found.after == pytest.approx((100 + found.still) / 2)
    assert found.nearer == 1 / 2
    assert first_frames([moves], [true], [grey(56, 1)]).kept == pytest.approx(-20 * np.log10(0.2))


def test_losses_are_those_before_the_first_run_and_after_the_last(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("".join(json.dumps({"step": s, "loss": 3 - s, "baseline": 2.5}) + "\n" for s in (0, 1, 2)))
    assert losses_of([first]) == {"untrained": 3, "trained": 1, "baseline": 2.5}
    second.write_text('{"step": 0, "loss": 0.9, "baseline": 2.5}\n{"step": 5, "loss": 0.8, "baseline": 2.5}\n')
    assert losses_of([first, second]) == {"untrained": 3, "trained": 0.8, "baseline": 2.5}
    first.write_text('{"step": 1, "loss": 2, "baseline": 2.5}\n')
    with pytest.raises(ValueError, match="first.jsonl: has no measurement before update 1"):
        losses_of([first, second])


@pytest.fixture
def clips(tmp_path):
    """Two clips of each caption, nearly alike, and the CSV."""
    rng = np.random.default_rng(0)
    rows = []
    for number, caption in enumerate(CAPTIONS * 2):
        frames = np.full((SIZE[0], *SIZE[1:], 3), 20 + 50 * (number % 4) + 4 * (number // 4), np.uint8)
        frames[1:] += rng.integers(0, 5, (SIZE[0] - 1, 1, 1, 1), np.uint8)
        write_video(tmp_path / f"{number}.mp4", frames, 8)
        rows.append((f"{number}.mp4", caption))
    write_csv(tmp_path / "clips.csv", ("video", "caption"), rows)
    return tmp_path / "clips.csv"


class PixelCodec:
    """Latents that are pixels."""

    chunk, in_channels = (1, 1), 3

    def pixel_size(self, size):
        return size

    def latent_size(self, size):
        return size

    def frames_of(self, latents):
        return latents

    def encode(self, x, seed=None):
        return x

    def decode(self, z, num_frames):
        return z


class Listener:
    """Stands for a pipeline: what it generates is known, and so is all that it was given."""

    codec, latent_size = PixelCodec(), SIZE

    def __init__(self, config, heeds: bool):
        self.config, self.heeds = config, heeds
        self.items, self.noise = [], []

    def generate(self, items, noise):
        self.items += items
        self.noise += list(noise(items, 0).start())
        return [self.clip(item) for item in items]

    def clip(self, item):
        place = CAPTIONS.index(item.request.texts[0]) if self.heeds else 0
        clip = to_video_tensor(np.full((*SIZE, 3), 21 + 50 * place, np.uint8))
        if item.references:
            clip[:, :1] = item.references[0][:, :1]
        return clip


def judged(clips, monkeypatch, heeds, **settings):
    config = JudgeConfig(
        csv_path=str(clips),
        num_frames=SIZE[0],
        image_size=list(SIZE[1:]),
        save_dir=str(clips.parent / "judged"),
        **settings,
    )
    listener = Listener(config, heeds)
    monkeypatch.setattr("mg.generation.judging.check_paths", lambda config: None)
    monkeypatch.setattr("mg.generation.judging.load_pipeline", lambda config: listener)
    return judge(config), listener


def test_a_denoiser_that_follows_every_caption_scores_100_percent(clips, monkeypatch):
    found, listener = judged(clips, monkeypatch, True, noises=2, batch_size=3, first_frames=3)
    assert found["generated"] == 8
    assert {name: (each["share"], each["chance"], each["different"]) for name, each in found["captions"].items()} == {
        "all": (1, 1 / 4, 4),
        "1": (1, 1 / 2, 2),
        "2": (1, 1 / 2, 2),
    }
    assert all(each["own"] > 30 and each["others"] < 20 for each in found["captions"].values())
    assert found["first_frames"]["clips"] == 3 and found["first_frames"]["kept"] == 100
    assert json.loads((clips.parent / "judged" / FILE).read_text()) == found

    for first in range(4):  # all captions share the noise, and the next four have other
        np.testing.assert_array_equal(listener.noise[first], listener.noise[0])
        np.testing.assert_array_equal(listener.noise[4 + first], listener.noise[4])
    assert not np.array_equal(listener.noise[0], listener.noise[4])


def test_a_denoiser_that_ignores_captions_is_right_by_chance(clips, monkeypatch):
    found, _ = judged(clips, monkeypatch, False, first_frames=0, noises=1)
    assert [(each["share"], each["chance"]) for each in found["captions"].values()] == [
        (1 / 4, 1 / 4),
        (1 / 2, 1 / 2),
        (1 / 2, 1 / 2),
    ]
    assert found["first_frames"] is None


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"loop": 2, "condition_frame_length": 1}, "loop"),
        ({"noises": 0}, "noises"),
        ({"num_frames": 1}, "first_frames must be 0 if num_frames is 1"),
        ({"scheduler": SchedulerSection(type="dpm-solver")}, "can keep none; use iddpm, or set it to 0"),
    ],
)
def test_input_that_cannot_be_judged_is_named(settings, wanted):
    with pytest.raises(ValueError, match=wanted):
        JudgeConfig(csv_path="clips.csv", image_size=[16, 16], **settings)


def test_the_command_prints_what_was_found(clips, tmp_path, monkeypatch, capsys):
    place = Workplace(tmp_path / "place", monkeypatch)
    config = place.config("STDiT3-XL/2", "rflow", num_frames=4, image_size=[16, 16])
    (tmp_path / "validation.jsonl").write_text('{"step": 0, "loss": 3.0, "baseline": 2.0}\n')
    arguments = ["--csv_path", clips, "--noises", 1, "--captions", 2, "--first_frames", 1, "--batch_size", 2]
    arguments += ["--validation", tmp_path / "validation.jsonl", "--frame_interval", 2]
    run_here(monkeypatch, "tools/judge_generation.py", "--config", config, *arguments)
    said = capsys.readouterr().out
    assert "caption: followed in" in said and "by chance 25% (4 different ones)" in said
    assert "given first frame: 100.0 dB" in said
    assert "validation loss: 3.0000; untrained 3.0000, predicting the mean 2.0000" in said
    assert (place.samples / FILE).is_file()
