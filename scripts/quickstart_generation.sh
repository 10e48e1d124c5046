#!/usr/bin/env bash
# From pixels to generated clips: make clips with captions, encode them, train a small denoiser, generate from texts and
# from a first frame, measure. Needs Python 3.10-3.12; makes .venv and installs what is missing, once.
#
#     ./scripts/quickstart_generation.sh [OUTPUT_FOLDER [options for scripts/train.py ...]]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment
install requirements.txt
install requirements-text.txt

out=${1:-outputs/quickstart_generation}
configs=configs/generation/quickstart

echo "1/5 clips of photographs, moved as a camera moves; and others of the same photographs to measure on"
python tools/make_clips.py --config $configs/clips.yaml --output_dir "$out/clips"
python tools/make_clips.py --config $configs/clips.yaml --seed 1 --train_clips 16 --output_dir "$out/test_clips"

echo "2/5 their latents, by the image VAE of this repository, and a text encoder that knows the words of their captions"
for clips in clips test_clips; do
    python scripts/encode_latents.py --ckpt_path assets/image_vae --csv_path "$out/$clips/train.csv" --image_size 64 \
        --num_frames 8 --frame_stride 3 --output_path "$out/latents/$clips"
done
python tools/make_text_encoder.py --csv_path "$out/clips/train.csv" --output_dir "$out/text_encoder"

echo "3/5 training"
python scripts/train.py --config $configs/train.yaml --latents_path "$out/latents/clips" \
    --text_encoder.from_pretrained "$out/text_encoder" --validation.latents_path "$out/latents/test_clips" \
    --outputs "$out/train" --resume "${@:2}"

echo "4/5 clips from texts; from the first frame of a test clip, under two captions; and a long one in three loops"
trained=(--config $configs/inference.yaml --ckpt-path "$out/train/stdit3.ckpt"
    --text_encoder.from_pretrained "$out/text_encoder")
generate() {
    python scripts/inference.py "${trained[@]}" --beside "$out/clips/train.csv" --save-dir "$out/samples" "$@"
}
first='{"reference_path": "'"$out"'/test_clips/videos/train_000.mp4", "mask_strategy": "0"}'
generate --prompt-path assets/texts/quickstart.txt --sample-name text
generate --prompt "an astronaut, the camera moves left$first" "an astronaut, the camera moves right$first" \
    --sample-name first_frame
generate --prompt "a rocket, the camera moves right" --loop 3 --sample-name long

echo "5/5 what was learnt"
python tools/judge_generation.py "${trained[@]}" --csv_path "$out/clips/train.csv" --noises 1 \
    --test_csv_path "$out/test_clips/train.csv" --first_frames 8 --validation "$out/train/validation.jsonl" \
    --save_dir "$out/judged"

echo
echo "samples beside training clips   $out/samples/index.html   (open it in a browser)"
echo "loss curve                      $out/train/loss.png"
echo "all numbers                     $out/judged/judged.json, $out/train/validation.jsonl"
