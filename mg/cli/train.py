"""Train any of the models: an autoencoder or, if the config has a section `scheduler`, a denoiser.

    mg-train --config configs/tae/train/mixed_256x256x16.yaml \
        --output_path outputs/tae --csv_path train.csv --video_folder videos

    mg-train --config configs/dc_ae/train/video_dc_ae.yaml --dataset.data_path train.csv
    mg-train --config configs/dc_ae/train/video_dc_ae_disc.yaml --dataset.data_path train.csv \
        --model.from_pretrained outputs/video_dc_ae/checkpoints/step_090000

    mg-train --config configs/temporal_vae/train/stage1.yaml --data_path train.csv
    mg-train --config configs/temporal_vae/train/stage2.yaml --data_path train.csv
    mg-train --config configs/temporal_vae/train/stage3.yaml --data_path train.csv

    mg-train --config configs/generation/opensora-v1-1/train/stage1.yaml --data-path train.csv \
        --ckpt-path models/PixArt-Sigma-XL-2-512-MS.pth
"""

from mg.config import gives_section, parse_config, run_command_line
from mg.generation.training.config import DenoiserTrainConfig
from mg.training.autoencoder import TrainConfig
from mg.training.trainer import train


def main() -> None:
    if gives_section("scheduler"):
        config = parse_config(DenoiserTrainConfig, "Train a denoiser on latents of videos and images with captions.")
    else:
        config = parse_config(TrainConfig, "Train a video autoencoder on the videos and images of a CSV.")
    if weights := train(config):  # only on the first worker
        print(f"weights: {weights}")


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
