"""Generate videos and images from prompts, images and videos with a diffusion transformer.

    mg-generate configs/generation/opensora-v1-1/inference/sample.yaml \
        --ckpt-path models/OpenSora-STDiT-v2-stage3 --prompt "A serene lake at dawn." --save-dir samples/lake
    mg-generate configs/generation/opensora-v1-1/inference/sample-ref.yaml --prompt-path prompts.txt --loop 3

writes videos, samples.jsonl and index.html to the folder. Running the command again makes what is missing.
"""

from mg import runtime
from mg.config import exit_status, parse_config, run_command_line
from mg.generation.config import GenerateConfig
from mg.generation.generate import generate


def main() -> int:
    """0 if every sample is there, 1 if one failed."""
    config = parse_config(GenerateConfig, __doc__.splitlines()[0])
    found = runtime.setup(config.device, config.mode, config.seed)
    report = generate(config, found.rank, found.world_size)
    print(
        f"{report.made} samples made, {report.there} there before, {len(report.failed)} failed; see {config.save_dir}"
    )
    if config.gallery:
        print(f"to look at: {config.save_dir}/index.html")
    return exit_status(len(report.failed), report.made + report.there, found.world_size)


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
