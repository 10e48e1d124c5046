"""Tiled encoding and decoding: the untiled shape at any size, near the untiled result, in memory that does not grow."""

import json
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest

from mg.models.tae.tae import TemporalAutoencoder

CONFIG = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}


@pytest.fixture(scope="module")
def model():
    return TemporalAutoencoder(CONFIG)


def video(*shape: int) -> np.ndarray:
    """Smooth in space and time, as natural video is."""
    axes = np.meshgrid(*(np.linspace(0, 3, n) for n in shape[2:]), indexing="ij")
    waves = [np.sin(sum(k * axis for k, axis in zip(ks, axes))) for ks in ((1, 2, 1), (2, 1, -1), (-1, 1, 2))]
    return np.stack([np.stack((waves * 2)[: shape[1]])] * shape[0]).astype(np.float32)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 1, 8, 8),
        *(pytest.param(shape, marks=pytest.mark.full) for shape in ((1, 3, 17, 17, 9), (2, 3, 27, 10, 37))),
    ],
)
def test_tiled_shapes_are_untiled_shapes(model, shape):
    x = ms.Tensor(video(*shape))
    model.disable_tiling()
    z, y = model.encode(x).mean, model(x)
    frames = model.decode(z).shape
    model.enable_tiling(encode_tile=16, decode_tile=16, decode_overlap=8, spatial_tile=16, spatial_overlap=8)
    tiled = model.encode(x)
    assert tiled.mean.shape == tiled.logvar.shape == tiled.z.shape == z.shape
    assert model.decode(z).shape == frames
    assert model.decode(z, num_target_frames=shape[2]).shape[2] == shape[2]
    assert model(x).shape == y.shape == shape


def test_a_clip_within_one_tile_is_untouched(model):
    x = ms.Tensor(video(1, 3, 16, 24, 16))
    model.disable_tiling()
    whole = model(x).asnumpy()
    model.enable_tiling(spatial_tile=32)
    assert np.array_equal(model(x).asnumpy(), whole)


def test_tiles_of_equal_frames_decode_as_the_whole(model):
    """Where every tile sees the same statistics, norms cannot tell a tile from the whole: only edges of time differ."""
    still = ms.Tensor(np.repeat(video(1, 4, 1, 2, 2), 7, axis=2))
    model.disable_tiling()
    whole = model.decode(still).asnumpy()
    model.enable_tiling()
    assert np.abs(model.decode(still).asnumpy() - whole).max() < 1e-4 * np.abs(whole).max()


@pytest.mark.full
def test_how_far_tiled_is_from_untiled(model):
    """Norms see a tile instead of the whole clip, so the two differ: by about a fifth of the output's deviation for
    random weights and the smallest tiles, where edges are everywhere."""
    x = ms.Tensor(video(1, 3, 48, 32, 32))
    model.disable_tiling()
    z = model.encode(x).mean
    whole = model.decode(z).asnumpy()
    model.enable_tiling(encode_tile=32, decode_tile=32, decode_overlap=16, spatial_tile=24, spatial_overlap=8)
    difference = np.abs(model.decode(z).asnumpy() - whole)
    assert 0.01 * whole.std() < difference.mean() < 0.3 * whole.std()


def test_both_switches_of_tiling():
    by_constructor = TemporalAutoencoder(CONFIG, use_tile=True, encode_tile=16, decode_tile=24, decode_overlap=8)
    assert by_constructor.tiling.encode_tile == 16
    assert (by_constructor.tiling.decode_tile, by_constructor.tiling.decode_overlap) == (24, 8)
    assert TemporalAutoencoder(CONFIG, use_tile=True).tiling.decode_overlap == 16
    assert TemporalAutoencoder(CONFIG).tiling is None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"encode_tile": 12}, "encode_tile is 12; it must be a positive multiple of 8"),
        ({"decode_overlap": 32}, "decode_overlap is 32"),
        ({"spatial_tile": 20}, "spatial_tile is 20"),
    ],
)
def test_tiles_that_do_not_fit(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.enable_tiling(**settings)


PEAK = """
import json, re, sys
from pathlib import Path
import mg
import mindspore as ms
import numpy as np
from mg import runtime
from mg.models import create_model

runtime.setup("cpu", "pynative", blocking=True)
model = create_model("tae", **json.loads(sys.argv[1]))
if sys.argv[2] == "tiled":
    model.enable_tiling(spatial_tile=64, spatial_overlap=16)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
def decode(size):
    model.decode(ms.Tensor(np.zeros((1, 4, 2, size // 8, size // 8), np.float32))).asnumpy()
    return peak()
start = decode(64)
print(json.dumps([decode(128) - start, decode(256) - start]))
"""


@pytest.mark.full
def test_memory_of_a_tiled_decode_does_not_grow_with_the_frame():
    """Beyond what frames of one tile took, in MB: frames of 16 tiles add their own pixels and little more."""

    def grown(kind):
        run = subprocess.run(
            [sys.executable, "-c", PEAK, json.dumps(CONFIG), kind], capture_output=True, text=True, check=True
        )
        return json.loads(run.stdout.splitlines()[-1])

    tiled, whole = grown("tiled"), grown("whole")
    assert whole[1] > 100
    assert tiled[1] < 0.1 * whole[1] + 16
