"""The masks of training are the original's, draw by draw, without its faults."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from mg.diffusion.mask_generator import MASKS, MaskGenerator

CASES = json.loads((Path(__file__).parent / "data" / "generation" / "mask_generator" / "masks.json").read_text())


class PythonRandom:
    """What of numpy's generators is asked for, by Python's, from which the original draws."""

    def __init__(self, seed: int, uniform=()):
        self.source, self.values = random.Random(seed), uniform

    def random(self, count=None):
        return self.source.random() if count is None else np.array(self.values)

    def integers(self, low, high, endpoint):
        assert endpoint
        return self.source.randint(low, high)

    def uniform(self, low, high):
        return self.source.uniform(low, high)


@pytest.mark.parametrize("name", MASKS)
def test_each_mask_is_the_original_s(name):
    cases = [case for case in CASES["single"] if case["name"] == name]
    assert len(cases) > 8
    for case in cases:
        mask = MaskGenerator({name: 1.0})(PythonRandom(case["seed"], case.get("uniform", ())), case["T"])
        assert mask.dtype == bool and mask.shape == (case["T"],)
        wanted = case.get("mask")
        if wanted is None:  # the original fails: a quarter of two or three frames is none
            assert case["T"] < 4 and 0 < mask.sum() < case["T"]
        else:
            wanted[-1] |= not any(wanted)  # where it gives all frames, nothing would be left to learn
            assert mask.astype(int).tolist() == wanted, case


def test_mixtures_are_the_original_s():
    for case in CASES["mixed"]:
        generator, rng = MaskGenerator(case["ratios"]), PythonRandom(case["seed"])
        assert [generator(rng, case["T"]).astype(int).tolist() for _ in case["masks"]] == case["masks"]


@pytest.mark.parametrize("name", MASKS)
def test_at_least_one_frame_is_generated(name):
    generator, rng = MaskGenerator({name: 1.0}), np.random.default_rng(0)
    for frames in (1, 2, 3, 4, 5, 8):
        masks = [generator(rng, frames) for _ in range(60)]
        assert all(mask.any() for mask in masks)
        assert any(not mask.all() for mask in masks) == (name != "identity" and frames > 1)


def test_shares_are_the_ratios_and_identity_has_the_rest():
    generator, rng = MaskGenerator({"image_head": 0.2, "mask_quarter_tail": 0.1, "interpolate": 0.05}), None
    assert generator.ratios == pytest.approx(
        {"image_head": 0.2, "quarter_tail": 0.1, "intepolate": 0.05, "identity": 0.65}
    )
    rng = np.random.default_rng(0)
    masks = np.array([generator(rng, 8) for _ in range(4000)])
    whole = masks.all(1).mean()
    heads, tails = (~masks[:, 0] & masks[:, 2:].all(1)).mean(), (~masks[:, -1] & masks[:, :6].all(1)).mean()
    assert abs(whole - 0.65) < 0.03 and abs(heads - 0.2) < 0.03 and abs(tails - 0.1) < 0.03
    assert (MaskGenerator({"mask_no": 1.0}).ratios) == {"identity": 1.0}


@pytest.mark.parametrize(
    "ratios, said",
    [
        ({"mask_head": 0.1}, "mask_ratios has no mask 'mask_head'; it may be one of quarter_head, image_head"),
        ({"mask_random": 0.1}, "mask_ratios has no mask 'mask_random'; it may be one of quarter_random, image_random"),
        ({"image_haed": 0.1}, "no mask 'image_haed'; it may be one of image_head"),
        ({"foo": 0.1}, "no mask 'foo'; it may be one of identity, quarter_random"),
        ({"image_head": 1.5}, "mask_ratios has 1.5 for image_head; ratios must be between 0 and 1"),
        ({"image_head": 0.6, "image_tail": 0.6}, "mask_ratios add up to 1.2"),
        ({"identity": 0.6, "image_tail": 0.2}, "mask_ratios add up to 0.8"),
        ({"identity": 0.5, "mask_no": 0.5}, "mask_ratios has identity twice, once as mask_no"),
    ],
)
def test_ratios_that_cannot_be_are_one_line(ratios, said):
    with pytest.raises(ValueError) as error:
        MaskGenerator(ratios)
    assert said in str(error.value) and "\n" not in str(error.value)
