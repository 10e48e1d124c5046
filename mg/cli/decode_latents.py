"""Decode a folder of latents to videos, and still images to images.

    mg-decode-latents --latents_path outputs/latents --output_path samples/decoded
    mg-decode-latents --latents_path outputs/latents --names a.mp4 b.mp4 --output_path samples/decoded

It uses the model and checkpoint of the encoding. The checkpoint may have moved (--ckpt_path), but must have the same
hash. Running the command again makes what is missing.
"""

from mg import runtime
from mg.config import exit_status, parse_config, run_command_line
from mg.inference.decode import DecodeConfig, decode_folder
from mg.plain_text import printable


def main() -> int:
    """0 if no video failed, 1 if one did; see `exit_status`."""
    config = parse_config(DecodeConfig, __doc__.splitlines()[0])
    worker = runtime.setup(config.device, config.mode)
    report = decode_folder(config, worker.rank, worker.world_size)
    for name, error in report.failed:
        print(f"failed: {printable(name)}: {error}")
    print(
        f"{report.decoded} videos decoded, {report.there} were there, {len(report.failed)} failed; "
        f"see {config.output_path}"
    )
    return exit_status(len(report.failed), report.decoded + report.there, worker.world_size)


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
