"""Encode prompts, or the captions of a CSV, into a folder of embeddings that replaces the text encoder.

    mg-encode-text --ckpt_path t5-v1_1-xxl --text_encoder.model_max_length 200 --text_encoder.dtype bf16 \
        --prompt_path prompts.txt --output_path outputs/embeddings
    msrun --worker_num=8 --local_worker_num=8 "$(which mg-encode-text)" ...     # the same, on eight devices

writes safetensors shards, index.jsonl with a row per text, and embeddings.json with shared settings. Running the
command again resumes a stopped run. `mg.text.open_embeddings(folder)` reads the folder.
"""

from mg import runtime
from mg.cli import end_of_encoding
from mg.config import parse_config, run_command_line
from mg.text.store import EncodeTextConfig, encode_texts


def main() -> int:
    """0 if none of this rank's texts failed, 1 if one did; see `exit_status`."""
    config = parse_config(EncodeTextConfig, __doc__.splitlines()[0])
    worker = runtime.setup(config.device, config.mode)
    report = encode_texts(config, worker.rank, worker.world_size)
    return end_of_encoding(report, "texts", config.output_path, worker)


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
