"""Measure how fast models encode, decode and train, compared with a PyTorch network of the same kind.

    mg-benchmark-speed                                        # every model at its default size
    mg-benchmark-speed --models tae --parts encode decode --sizes 16x64x64 16x128x128 --threads 2
    mg-benchmark-speed --models tae --growth 1 2 4            # cost by frames, area and batch, and a plot

prints a table of seconds, frames/s, peak memory, compile time, operations, and the ratio to the peer's time, taken pair
by pair; below 1 is faster. All of it, and every single timing, is in speed.json too.
"""

from mg.benchmark.growth import measure_growth
from mg.benchmark.speed import SpeedConfig, format_table, measure_speed
from mg.cli import measured
from mg.config import parse_config, run_command_line


def main() -> int:
    config = parse_config(SpeedConfig, __doc__.splitlines()[0])
    return measured(config, measure_growth if config.growth else measure_speed, format_table)


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
