"""Train any of the models, in one stage or more.

    python scripts/train_vae.py --config configs/dc_ae/train/video_dc_ae.yaml --dataset.data_path train.csv
    python scripts/train_vae.py --config configs/dc_ae/train/video_dc_ae_disc.yaml --dataset.data_path train.csv \\
        --model.from_pretrained outputs/video_dc_ae/checkpoints/step_090000

    python scripts/train_vae.py --config configs/temporal_vae/train/stage1.yaml --data_path train.csv
    python scripts/train_vae.py --config configs/temporal_vae/train/stage2.yaml --data_path train.csv
    python scripts/train_vae.py --config configs/temporal_vae/train/stage3.yaml --data_path train.csv
"""

from mg.config import parse_config, run_command_line
from mg.training.trainer import TrainConfig, train


def main() -> None:
    config = parse_config(TrainConfig, "Train a video autoencoder, with or without a discriminator.")
    if weights := train(config):  # the first worker's alone
        print(f"weights: {weights}")


if __name__ == "__main__":
    run_command_line(main)
