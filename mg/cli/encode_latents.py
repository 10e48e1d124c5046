"""Encode the videos and images of a CSV into a folder of latents, to train a diffusion model on.

    mg-encode-latents --config configs/tae/latents/video_256x256.yaml --ckpt_path tae.ckpt \
        --csv_path train.csv --video_folder videos --output_path outputs/latents
    msrun --worker_num=8 --local_worker_num=8 "$(which mg-encode-latents)" ...     # the same, on eight devices

writes safetensors shards, index.jsonl with a row per video, and latents.json with shared settings. Running the command
again resumes a stopped run. `mg.latents.open_latents(folder)` reads the folder.
"""

from mg import runtime
from mg.cli import end_of_encoding
from mg.config import parse_config, run_command_line
from mg.inference.encode import EncodeConfig, encode_csv


def main() -> int:
    """0 if none of this rank's videos failed, 1 if one did; see `exit_status`."""
    config = parse_config(EncodeConfig, __doc__.splitlines()[0])
    worker = runtime.setup(config.device, config.mode, config.seed)
    report = encode_csv(config, worker.rank, worker.world_size)
    return end_of_encoding(report, "videos", config.output_path, worker)


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
