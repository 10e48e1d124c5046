"""Reconstruct the videos and images of a CSV with a video autoencoder, and measure PSNR and SSIM.

python scripts/inference_vae.py --ckpt_path tae.ckpt --batch_size 2 --num_frames=16 --image_size 256 \
    --csv_path test.csv --video_folder videos --enable_tile=False
"""

from mg.config import parse_config, run_command_line
from mg.evaluation.reconstruction import InferenceConfig, format_table, reconstruct_csv
from mg.runtime import setup


def main() -> int:
    """0 if at least one clip was reconstructed, 1 if none was."""
    config = parse_config(InferenceConfig, __doc__.splitlines()[0])
    setup(config.device, config.mode, config.seed)
    report = reconstruct_csv(config)
    print(format_table(report))
    print(f"{len(report.succeeded)} of {len(report.results)} clips reconstructed; see {config.output_path}")
    return 0 if report.succeeded else 1


if __name__ == "__main__":
    run_command_line(main)
