"""Measure how many clips per second the data loader reads, by videos, decoder and number of workers.

    mg-benchmark-loader                                        # test videos of 360p, 720p and 1080p
    mg-benchmark-loader --csv_path train.csv --video_folder videos --num_frames 16 --workers 1 8 16 --kinds processes

prints clips/s, the speedup over the first row, the CPU time per clip, the time to the first clip, and the memory of a
worker; then the cost of a clip, in seconds and bytes read, by the length of its file, and the memory of a worker by the
size of the frames. All of it, and every single run, is in loader.json too.
"""

from mg.benchmark.loader_speed import LoaderSpeedConfig, format_table, measure_loader
from mg.cli import measured
from mg.config import parse_config, run_command_line


def main() -> int:
    config = parse_config(LoaderSpeedConfig, __doc__.splitlines()[0])
    return measured(config, measure_loader, format_table)


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
