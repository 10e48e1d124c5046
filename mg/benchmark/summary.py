"""Summary of a benchmark's rows per model, and how they were measured: summary.json, and the same as text."""

import os
import platform
from collections import Counter

import mindspore as ms
import numpy as np

from mg.benchmark.report import ERROR_MAP_RANGE
from mg.benchmark.results import ResultRow
from mg.evaluation.measures import METRICS, Measures
from mg.plain_text import printable, text_table


def summarize(rows: list[ResultRow], settings: dict, measures: Measures, broken: dict[str, str]) -> dict:
    """The contents of summary.json.

    Args:
        settings: what the rows depend on, as in settings.json.
        broken: why models could not be built, by label.
    """
    return {
        "videos": settings["videos"]["count"],
        "models": {
            label: {
                **described,
                "device": settings["device"],
                "mode": settings["mode"],
                **_figures([row for row in rows if row.model == label]),
                **({"error": broken[label]} if label in broken else {}),
            }
            for label, described in settings["models"].items()
        },
        "left_out": {**measures.left_out, **broken},
        "flow": measures.config.flow,
        "measures": measures.describe(),
        "protocol": _protocol(settings),
        "machine": {
            "device": settings["device"],
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "mindspore": ms.__version__,
        },
        "settings": {key: value for key, value in settings.items() if key != "models"},
    }


def format_summary(summary: dict) -> str:
    """The models' figures, what was left out and what failed, as text."""
    measured = [f"{name} ({summary['flow']})" if name == "flolpips" else name for name in summary["measures"]]
    lines = [["model", *measured, "compression", "encode/s", "decode/s", "MiB", "videos"]]
    for label, model in summary["models"].items():
        figures = [model["mean"].get(name) for name in summary["measures"]]
        figures += [model["compression"] and model["compression"]["ratio"]]
        figures += [model["encode_frames_per_second"], model["decode_frames_per_second"]]
        figures += [model["peak_memory"] and model["peak_memory"]["bytes"] / 2**20]
        texts = ["-" if value is None else f"{value:.4g}" for value in figures]
        lines.append([label, *texts, f"{model['succeeded']} of {summary['videos']}"])
    text = text_table(lines)
    text += [f"left out: {name}: {why}" for name, why in summary["left_out"].items()]
    for label, model in summary["models"].items():
        text += [f"failed: {label}: {printable(failure['name'])}: {failure['error']}" for failure in model["failures"]]
    return "\n".join(text)


def _figures(rows: list[ResultRow]) -> dict:
    good = [row for row in rows if row.ok]
    taken = {name: [getattr(row, name) for row in good if getattr(row, name) is not None] for name in METRICS}
    shapes = Counter(f"{row.frames}x{row.height}x{row.width}" for row in good)
    found = {
        "videos": len(rows),
        "succeeded": len(good),
        "failed": len(rows) - len(good),
        "failures": [{"name": row.name, "error": row.error} for row in rows if not row.ok],
        "frames": sum(row.frames for row in good),
        "resolutions": dict(shapes),
        "mean": {name: float(np.mean(values)) for name, values in taken.items() if values},
        "measured_videos": {name: len(values) for name, values in taken.items() if values},
        "encode_frames_per_second": _rate(good, "encode_seconds"),
        "decode_frames_per_second": _rate(good, "decode_seconds"),
        "compression": None,
        "peak_memory": None,
    }
    if good:
        values, latent_values = sum(row.values for row in good), sum(row.latent_values for row in good)
        found["compression"] = {
            "ratio": values / latent_values,
            "values_per_pixel": 3 * latent_values / values,
            "cell": good[0].cell,
            "channels": int(good[0].latents.split("x")[0]),
        }
    peaks = [(row.peak_memory, row.memory_of) for row in good if row.peak_memory]
    if peaks:
        found["peak_memory"] = dict(zip(("bytes", "of"), max(peaks)))
    return found


def _rate(rows: list[ResultRow], seconds: str) -> float | None:
    timed = [row for row in rows if getattr(row, seconds)]
    return sum(row.frames for row in timed) / sum(getattr(row, seconds) for row in timed) if timed else None


def _protocol(settings: dict) -> dict[str, str]:
    clips = settings["clips"]
    frames = f"the first {clips['num_frames']} frames" if clips.get("num_frames") else "all frames"
    thinned = f", every {clips['frame_stride']}. of them" if clips["frame_stride"] > 1 else ""
    thinned += f", thinned to at most {clips['fps_max']:g} per second" if clips["fps_max"] else ""
    size = f"short side {clips['image_size']} pixels" if clips.get("image_size") else "original size"
    size += ", middle square" if clips.get("crop") else ""
    if "buckets" in clips:
        frames, size = "the first frames, as many as a video's bucket has", "its bucket's size, centre-cropped"
    return {
        "clips": f"{frames}{thinned}; {size}; a video counts only if all of these frames decode",
        "quality": "float reconstruction from the posterior's mean, clipped to [0, 1] and not rounded, against the "
        "clip as the model saw it; averaged over the frames, then over the videos",
        "compression": "values of the videos (3 per pixel) / values of their latents, padding included; the cell is "
        "the frames x height x width of pixels per latent",
        "speed": "frames of all clips / seconds of all clips, one clip at a time, each shape having run once before; "
        "encoding is from pixels to latents, decoding back to pixels, both including copies to and from the host",
        "memory": "largest peak over all clips while encoding and decoding: of the device if MindSpore reports it, "
        "else resident memory of the process: Python, libraries, and a little left by earlier models",
        "error maps": f"absolute difference, averaged over channels; black 0, brightest {ERROR_MAP_RANGE:g} or more",
    }
