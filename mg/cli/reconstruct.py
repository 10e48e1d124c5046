"""Reconstruct the videos and images of a CSV with a video autoencoder, and measure PSNR, SSIM and the loss.

    mg-reconstruct --ckpt_path tae.ckpt --batch_size 2 --num_frames=16 --image_size 256 \
        --csv_path test.csv --video_folder videos --enable_tile=False
    mg-reconstruct --config configs/temporal_vae/inference/video.yaml \
        --ckpt_path models/OpenSora-VAE-v1.2 --data_path test.csv --save_dir samples/vae_video

The second writes the folders samples/vae_video_ori, _rec and _spatial, and the metrics to samples/vae_video.
"""

from mg import runtime
from mg.benchmark.quality import report_command
from mg.config import exit_status, parse_config, run_command_line
from mg.inference.reconstruction import InferenceConfig, format_table, output_folders, reconstruct_csv


def main() -> int:
    """0 if every clip was reconstructed, 1 if one failed."""
    config = parse_config(InferenceConfig, __doc__.splitlines()[0])
    runtime.setup(config.device, config.mode, config.seed)
    report = reconstruct_csv(config)
    print(format_table(report))
    print(f"{len(report.succeeded)} of {len(report.results)} clips reconstructed; see {config.output_path}")
    if config.separate_folders and config.save_videos:
        print("videos and images:", *output_folders(config).values())
    if report.succeeded:
        print("for a report with speed, memory and error maps:", report_command(config), sep="\n    ")
    if report.unwritten:
        raise report.unwritten
    return exit_status(len(report.failed), len(report.succeeded))


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
