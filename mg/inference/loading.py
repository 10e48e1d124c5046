"""The options that every command running an autoencoder over clips has, and the model that they describe.

    model = load_model(config)
    for batch, x in batches(rows, config, on_error):    # x (B, 3, T, H, W)
        for clips, y in spared(compute, batch, x, on_error):
            ...

The batches are those of `mg.inference.batches`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from mg.config import PATH_ALIASES, require
from mg.data.clips import ClipOptions
from mg.models import VideoAutoencoder, from_pretrained
from mg.sampling import clips_noise
from mg.tiling import TilingConfig


@dataclass
class ModelSection:
    """The autoencoder.

    Args:
        from_pretrained: checkpoint: a file, or a folder that `save_pretrained` wrote.
        name: dc_ae | hunyuan_vae | image_vae | tae | temporal_vae; by default read from the config next to the
            checkpoint or from its tensors.
        config: keys that override that config.
        dtype: precision of convolutions and matrix products.
        use_spatial_tiling: run frames larger than a tile in tiles, which bounds the memory.
        use_temporal_tiling: run videos longer than a tile in tiles.
        spatial_tile_size: height and width of a tile in pixels: the size of the clips that the model was trained on.
        temporal_tile_size: frames of a tile, likewise.
        tile_overlap_factor: fraction of a tile that overlaps the next one; overlaps are blended linearly.
    """

    from_pretrained: str
    name: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    use_spatial_tiling: bool = False
    use_temporal_tiling: bool = False
    spatial_tile_size: int = 256
    temporal_tile_size: int = 32
    tile_overlap_factor: float = 0.25


@dataclass
class TileFields:
    """Tile sizes and overlaps for enable_tile; any that is not given keeps the model's default.

    Args:
        encode_tile: frames of a tile to encode; 0 encodes all frames at once.
        encode_overlap: frames shared by neighbouring tiles when encoding.
        decode_tile: frames that a tile decodes to; 0 decodes all frames at once.
        decode_overlap: frames shared by neighbouring tiles when decoding.
        spatial_tile: height and width of a tile in pixels; 0 leaves frames whole.
        spatial_overlap: pixels shared by neighbouring tiles.
        last: shift moves the last tile back until it is full, short cuts it off.
    """

    encode_tile: int | None = None
    encode_overlap: int | None = None
    decode_tile: int | None = None
    decode_overlap: int | None = None
    spatial_tile: int | None = None
    spatial_overlap: int | None = None
    last: Literal["shift", "short"] | None = None

    def given(self) -> dict[str, int | str]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class ClipsConfig(ClipOptions):
    """A model, the clips to run through it, and how they are read.

    Args:
        model: the autoencoder.
        csv_path: CSV with a column `video` or `path`.
        output_path: folder to write to.
        seed: for sampling.
        sample_posterior: sample the posterior; by default its mean is used. Without a posterior (Video DC-AE) there
            is nothing to sample. A clip's sample depends only on the seed and its name.
        batch_size: clips of equal shape to run at once.
        enable_tile: run in tiles, which bounds the memory: true always, auto only if a clip doesn't fit into memory
            whole, in the largest tiles that do. Replaces model.use_spatial_tiling and model.use_temporal_tiling,
            which always tile.
        tiling: tile sizes and overlaps for enable_tile.

    Raises:
        ValueError: a setting is out of range.
    """

    aliases: ClassVar[dict[str, str]] = {
        **PATH_ALIASES,
        "dataset.data_path": "csv_path",
        "ckpt_path": "model.from_pretrained",
        "ckpt-path": "model.from_pretrained",
    }

    model: ModelSection
    csv_path: str
    output_path: str = "samples"
    seed: int = 42
    sample_posterior: bool = False
    batch_size: int = 1
    enable_tile: bool | Literal["auto"] = "auto"
    tiling: TileFields = field(default_factory=TileFields)

    def __post_init__(self):
        super().__post_init__()
        require(self.batch_size >= 1, self, "batch_size", "at least 1")
        if self.enable_tile is True and (self.model.use_spatial_tiling or self.model.use_temporal_tiling):
            raise ValueError(
                "enable_tile and model.use_spatial_tiling or model.use_temporal_tiling are two ways to set up tiles; "
                "turn one of them off"
            )


def load_model(config: ClipsConfig, path: str | None = None) -> VideoAutoencoder:
    """The model of `config.model`, with the weights of the checkpoint at `path` if given, and with tiling set up."""
    settings = config.model
    model = from_pretrained(path or settings.from_pretrained, settings.name, settings.dtype, **settings.config)
    if config.enable_tile:
        model.enable_tiling(**config.tiling.given())
    if config.enable_tile == "auto":  # keep the sizes; `Fitting` decides when to use them
        model.disable_tiling()
    if settings.use_spatial_tiling or settings.use_temporal_tiling:
        tiling = TilingConfig.from_tile_sizes(
            model.temporal_compression,
            model.spatial_compression,
            settings.use_spatial_tiling,
            settings.use_temporal_tiling,
            settings.spatial_tile_size,
            settings.temporal_tile_size,
            settings.tile_overlap_factor,
        )
        model.enable_tiling(**vars(tiling))
    return model


def noise_for(model: VideoAutoencoder, x: np.ndarray, names: Sequence[str], config: ClipsConfig) -> np.ndarray | None:
    """Noise for sampling the posterior of a batch of clips, x (B, 3, T, H, W), by their `names`; None if the mean is
    used or there is nothing to sample."""
    if not (config.sample_posterior and model.geometry.has_posterior):
        return None
    return clips_noise(config.seed, names, model.latent_shape(x.shape))
