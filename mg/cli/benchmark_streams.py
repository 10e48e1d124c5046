"""Measure how many frames per second of a long video a model encodes and decodes, from file to file.

    mg-benchmark-streams --device cuda --engines onnxruntime torch --precision bf16      # ten seconds of 720p
    mg-benchmark-streams --size 180p --frames 64 --engines mindspore onnxruntime openvino torch

prints frames/s, the seconds and share of reading, model and writing, each on its own, and the seconds of the whole, in
which they overlap, divided by those of the longest part. All of it, and every single time, is in streams.json too.
"""

from mg.benchmark.streams import StreamsConfig, format_table, measure_streams
from mg.cli import measured
from mg.config import parse_config, run_command_line


def main() -> int:
    config = parse_config(StreamsConfig, __doc__.splitlines()[0])
    return measured(config, measure_streams, format_table)


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
