"""Measure the latents of a video autoencoder over the clips of a CSV, and write the model with their scaling factors.

    mg-latent-statistics --ckpt_path models/dc_ae.ckpt --csv_path train.csv --video_folder videos \
        --num_frames 32 --save_dir models/dc_ae_scaled

The factors scale latents to the unit variance that a diffusion model is trained on; reconstructions do not depend on
them. For Video DC-AE, scaling_factor is the standard deviation of all latents: encode divides by it and decode
multiplies. For the Open-Sora 1.2 VAE, shift and scale are the mean and standard deviation of each channel: encode
returns (z - shift) / scale and decode undoes it. So no other code has to know about them. For the TAE and image VAEs,
scaling_factor is 1 / std and shift_factor the mean, and applying them is left to the caller:
z = (z - shift_factor) * scaling_factor.

The folder holds the model, for `from_pretrained` and --model.from_pretrained, and latent_statistics.json: mean and
standard deviation of the unscaled latents, per channel and overall.
"""

import numpy as np

from mg import runtime
from mg.config import exit_status, parse_config, run_command_line
from mg.inference.statistics import StatisticsConfig, measure_csv
from mg.plain_text import printable

SUMMARY, _, MEANING, _ = __doc__.split("\n\n")


def main() -> int:
    """0 if every clip was measured, 1 if one failed."""
    config = parse_config(StatisticsConfig, f"{SUMMARY} {MEANING}")
    runtime.setup(config.device, config.mode, config.seed)
    statistics, factors = measure_csv(config)
    for name, error in statistics.failures:
        print(f"failed: {printable(name)}: {error}")
    print(f"{statistics.clips} of {statistics.clips + len(statistics.failures)} clips measured")
    if statistics.channels is None:
        return 1
    overall = statistics.channels.over_channels()
    print(f"latents: mean {overall.mean:.6g}, standard deviation {overall.std:.6g}")
    for key, value in factors.items():  # a number, or one per channel
        print(key, *(f"{number:.6g}" for number in np.ravel(value)))
    if statistics.unwritten:
        raise statistics.unwritten
    print(f"see {config.output_path}")
    return exit_status(len(statistics.failures), statistics.clips)


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
