#!/usr/bin/env bash
# The main job from a fresh clone: make clips, inflate the image VAE in assets/, train the TAE, reconstruct clips that it
# has never seen. Needs Python 3.10-3.12; makes .venv and installs what is missing, once.
#
#     ./scripts/quickstart.sh [OUTPUT_FOLDER [options for scripts/train_tae.py ...]]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment
install requirements.txt

out=${1:-outputs/quickstart}

echo "1/5 clips of photographs, moved as a camera moves"
python tools/make_clips.py --config configs/tae/quickstart/clips.yaml --output_dir "$out/clips"

echo "2/5 the image VAE, inflated in time"
python tools/inflate_vae_to_tae.py --src assets/image_vae --target "$out/inflated.ckpt"

echo "3/5 training"
python scripts/train_tae.py --config configs/tae/quickstart/train.yaml --output_path "$out/train" \
    --csv_path "$out/clips/train.csv" --model.from_pretrained "$out/inflated.ckpt" --resume "${@:2}"

echo "4/5 reconstruction of the test clips, beside the untrained TAE and the plain baseline"
python scripts/inference_vae.py --config configs/tae/quickstart/inference.yaml --ckpt_path "$out/train/tae.ckpt" \
    --csv_path "$out/clips/test.csv" --compare "$out/inflated.ckpt" --output_path "$out/reconstructions"

echo "5/5 the benchmark of both, and of the plain baseline"
python scripts/benchmark.py --csv_path "$out/clips/test.csv" --num_frames 16 --image_size 128 --metric psnr ssim \
    --models "configs/tae/quickstart/inference.yaml=$out/train/tae.ckpt" \
    "configs/tae/quickstart/inference.yaml=$out/inflated.ckpt" --baseline 8x8 --output_path "$out/benchmark" \
    --resume=False

echo
echo "report          $out/benchmark/report.html   (open it in a browser)"
echo "loss curve      $out/train/loss.png"
echo "side by sides   $out/reconstructions/side_by_side/"
echo "metrics         $out/reconstructions/metrics.csv, metrics.json"
