"""Export a model's encoder and decoder as ONNX graphs at one tile's size, for onnxruntime, OpenVINO and PyTorch.

    mg-export --ckpt_path models/tae.ckpt --model tae --target outputs/tae_onnx --frames 16 --size 256
    mg-export --ckpt_path models/dc_ae.ckpt --target outputs/dc_ae_image --frames 1
    mg-export --ckpt_path models/tae.ckpt --target outputs/tae_mindir --format mindir

`mg.deploy.load(folder)` provides the same encode and decode for it, in the same tiles, for videos of any length and
size; it needs neither MindSpore nor the checkpoint. Tiles and overlaps default to the model's own. A network for one
frame is for images only. --format mindir writes NAME.mindir for mindspore.load instead of NAME.onnx.
"""

from mg import runtime
from mg.config import parse_config, run_command_line
from mg.deploy.export import ExportConfig, export

SUMMARY, _, MEANING = __doc__.strip().split("\n\n")


def main() -> None:
    config = parse_config(ExportConfig, f"{SUMMARY} {MEANING}")
    runtime.setup("cpu")
    for name, network in export(config)["networks"].items():
        print(f"{name}: {tuple(network['input'])} -> {tuple(network['output'])}")
    print(f"see {config.target}")


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
