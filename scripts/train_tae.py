"""Train the Movie Gen TAE, or another model that its config names.

    python scripts/train_tae.py --config configs/tae/train/mixed_256x256x16.yaml \
        --output_path outputs/tae --csv_path train.csv --video_folder videos
"""

from mg.config import parse_config, run_command_line
from mg.training.trainer import TrainConfig, train


def main() -> None:
    config = parse_config(TrainConfig, "Train a video autoencoder on the videos and images of a CSV.")
    if weights := train(config):  # the first worker's alone
        print(f"weights: {weights}")


if __name__ == "__main__":
    run_command_line(main)
