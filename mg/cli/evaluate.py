"""Measure the videos and images of one folder against those of the same names in another.

    mg-evaluate --real_video_dir samples/vae_ori --generated_video_dir samples/vae_rec \
        --num_frames 17 --image_size 256 --crop_size 256 --metric ssim psnr lpips flolpips

writes samples/vae_rec_metrics/metrics.csv and metrics.json. LPIPS and FloLPIPS need weights made by mg-convert-lpips;
without them only the other measures are computed.
"""

from mg import runtime
from mg.config import exit_status, parse_config, run_command_line
from mg.evaluation.pairs import EvaluateConfig, evaluate_folders, format_table


def main() -> int:
    """0 if every pair was measured, 1 if one failed, or there was none."""
    config = parse_config(EvaluateConfig, __doc__.splitlines()[0])
    runtime.setup(config.device, config.mode)
    report = evaluate_folders(config)
    print(format_table(report, config))
    measured, failed, unpaired = (len(report.rows(status)) for status in ("ok", "error", "unpaired"))
    print(f"{measured} pairs measured, {failed} failed, {unpaired} unpaired; see {config.output_path}")
    if report.unwritten:
        raise report.unwritten
    return exit_status(failed, measured) if measured else 1


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
