"""Check that encoding and decoding a video needs the same memory whatever its length.

    mg-benchmark-memory                              # 128 and 1,024 frames of 192 x 192, a small TAE
    mg-benchmark-memory --frames 128 1024 4096 --size 256 --ckpt_path models/tae.ckpt
    mg-benchmark-memory --models tae dc_ae           # bytes per pixel, which enable_tile auto relies on

encodes and decodes a video of each length, each in its own process, and prints the peaks of resident memory and their
ratio; they are in memory.json too.
"""

from pathlib import Path

from mg.benchmark.footprints import format_costs, measure_costs
from mg.benchmark.latent_memory import MemoryConfig, format_table, measure_memory
from mg.config import parse_config, run_command_line
from mg.runtime import chosen_mode


def main() -> int:
    """0 if the longer videos need at most `limit` times the memory of the first one, or no model needs more than is
    assumed, 1 if not."""
    config = parse_config(MemoryConfig, __doc__.splitlines()[0])
    if config.models:
        costs = measure_costs(
            config.models, chosen_mode(config.mode, "cpu"), Path(config.output_path) / "footprints.json"
        )
        print(format_costs(costs))
        return 0 if all(cost.per_pixel_and_channel <= cost.assumed for cost in costs) else 1
    found = measure_memory(config, "mg.cli.encode_latents", "mg.cli.decode_latents")
    print(format_table(found))
    print(f"the limit is {config.limit}; see {config.output_path}")
    return 0 if found["holds"] else 1


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
