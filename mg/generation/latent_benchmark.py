"""How well a denoiser learns on the latents of several autoencoders.

The same small denoiser is trained on each autoencoder's latents of the same clips, for the same number of updates and
from the same seed. As far as whole patches allow, its tokens represent the same pixels for all autoencoders, so that it
costs the same. Losses on different latents are not comparable; the loss relative to that of always predicting the mean
is, on held-out clips at the same times.

Under the output folder:

    results.csv             one row per autoencoder
    summary.json            the same, with curves
    report.html             the same as a standalone page, with samples
    train.csv, test.csv     the clips
    models/LABEL/           settings.json: what its figures depend on; a run with other settings is refused
        autoencoder/        the autoencoder, with factors that scale its latents to unit variance
        train/, test/       latents
        TOKENS/             run/: the training; samples/; result.json, written last: then it is not made again

If an autoencoder fails, its row has the error, and the others continue.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mg.benchmark.contestants import read_models
from mg.benchmark.results import write_settings
from mg.checkpoints import atomic_write
from mg.config import to_dict
from mg.data.index import IndexRow, read_index
from mg.evaluation.table import Table, error_of
from mg.generation.latent_learning import Autoencoder, LatentBenchmarkConfig, encode, learn
from mg.generation.latent_report import write_report
from mg.plain_text import csv_line, name_bytes, one_line, text_table, write_text
from mg.settings import check_settings

_logger = logging.getLogger(__name__)

COLUMNS = (
    "model", "status", "name", "compression", "values_per_pixel", "latents", "tokens", "patch", "parameters", "updates",
    "loss_untrained", "loss", "baseline", "share",
)  # fmt: skip


@dataclass
class LatentBenchmark:
    """The results of a run: autoencoder label -> result, which has an "error" instead of figures if it failed, and the
    report. `unwritten` is the error if one of the files could not be written."""

    results: dict[str, dict]
    report: Path
    unwritten: OSError | None = None

    @property
    def complete(self) -> bool:
        return not any("error" in result for result in self.results.values())


def run_latent_benchmark(config: LatentBenchmarkConfig) -> LatentBenchmark:
    """Train on the latents of all autoencoders, except those already done, and write results, summary and report.

    Raises:
        ValueError, OSError: an index, autoencoder file or folder that cannot be used; raised before anything is made.
    """
    indexes = {
        "train": read_index(config.csv_path, config.video_folder),
        "test": read_index(config.test_csv_path, config.test_video_folder),
    }
    folder = Path(config.output_path)
    autoencoders = [
        Autoencoder(model.label, model.settings, model.config, folder / "models" / model.label)
        for model in read_models(config.models)
        if model.config is not None  # None for baselines, which are not used here
    ]
    for one in autoencoders:
        if not config.resume and one.folder.exists():
            shutil.rmtree(one.folder)
        settings = _settings(config, indexes, one)
        if one.folder.exists():
            check_settings(one.folder / "settings.json", settings)
        one.folder.mkdir(parents=True, exist_ok=True)
        write_settings(one.folder / "settings.json", settings)
    for part, rows in indexes.items():
        _write_csv(folder / f"{part}.csv", rows, config.captioned)

    errors: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    results: dict[str, dict] = {}

    def attempt(one: Autoencoder, into: dict, make: Callable[[], Any]) -> None:
        try:
            into[one.label] = make()
        except Exception as error:  # any error: continue with the others
            errors[one.label] = one_line(error)
            _logger.warning("%s: %s", one.label, errors[one.label])

    for one in autoencoders:
        attempt(one, shapes, partial(encode, one, config, folder))
    tokens = config.tokens or [min(sizes) for sizes in zip(*(shape[1:] for shape in shapes.values()))]
    for one in autoencoders:
        if one.label in shapes:
            attempt(one, results, partial(learn, one, config, folder, shapes[one.label], tokens))

    found = {
        one.label: results.get(one.label) or {"name": one.settings["name"] or "", "error": errors[one.label]}
        for one in autoencoders
    }
    protocol = _protocol(config, tokens)
    return LatentBenchmark(found, folder / "report.html", error_of(lambda: _write(folder, found, protocol, config)))


def format_results(results: dict[str, dict]) -> str:
    """The results as text: a line per autoencoder, and those that failed."""
    lines = [["model", "compression", "values/pixel", "tokens", "parameters", "untrained", "share", "by band"]]
    for label, result in results.items():
        if "error" not in result:
            shares = [value / result["baseline"] for value in result["bands"].values()]
            figures = [result["compression"], result["values_per_pixel"]]
            lines.append([label, *(f"{value:.4g}" for value in figures), result["tokens"], f"{result['parameters']:,}"])
            lines[-1] += [f"{result[name]:.3f}" for name in ("share_untrained", "share")]
            lines[-1].append(" ".join(f"{share:.2f}" for share in shares))
    text = text_table(lines)
    text += [f"failed: {label}: {result['error']}" for label, result in results.items() if "error" in result]
    return "\n".join(text)


def _settings(config: LatentBenchmarkConfig, indexes: dict[str, list[IndexRow]], one: Autoencoder) -> dict:
    """The settings that an autoencoder's figures depend on, besides the tokens."""

    def described(rows: list[IndexRow]) -> dict:
        texts = "\n".join(f"{row.path.resolve()}\t{row.caption if config.captioned else ''}" for row in rows)
        return {"count": len(rows), "clips": hashlib.sha256(name_bytes(texts)).hexdigest()}

    names = ("denoiser", "text_encoder", "optim", "batch_size", "max_steps", "dtype", "validation_clips", "bands")
    names += ("samples", "num_sampling_steps", "seed")
    everything = json.loads(json.dumps(to_dict(config)))
    return {
        "autoencoder": one.settings,
        "clips": config.describe(),
        **{part: described(rows) for part, rows in indexes.items()},
        "training": {name: everything[name] for name in names},
    }


def _write_csv(path: Path, rows: Sequence[IndexRow], captioned: bool) -> None:
    """Write an index of the clips, with the same class for all as caption if captions are not used."""
    lines = [("video", "caption"), *((str(row.path.resolve()), row.caption if captioned else "0") for row in rows)]
    with atomic_write(path) as temporary:
        write_text(temporary, "".join(map(csv_line, lines)))


def _protocol(config: LatentBenchmarkConfig, tokens: Sequence[int]) -> dict[str, str]:
    denoiser = config.denoiser
    sizes = ", ".join(
        f"{name} {getattr(denoiser, name)}"
        for name in ("depth", "hidden_size", "num_heads")
        if getattr(denoiser, name) is not None
    )
    thinned = f", one of every {config.frame_stride} in the file" if config.frame_stride > 1 else ""
    told = "given the clips' captions" if config.captioned else "given nothing about the clips"
    return {
        "clips": f"the first {config.num_frames} frames{thinned}, the middle {config.image_size} x {config.image_size}",
        "latents": "the posterior's mean, scaled to unit variance over the training clips by the factors "
        "of mg-latent-statistics, in the convention of each kind of autoencoder",
        "network": f"{denoiser.type}, {sizes}, {told}; {'x'.join(map(str, tokens))} tokens per clip, as near as whole "
        "patches of latents allow, so that a token represents the same pixels",
        "training": f"rectified flow, {config.max_steps} updates of {config.batch_size} clips, {config.optim.name} at "
        f"{config.optim.lr:g}, seed {config.seed}",
        "share": "validation loss divided by that of always predicting the target's mean; held-out clips, noise and "
        "times are the same in every measurement. 1 means nothing was learnt",
        "bands": f"{config.bands} equal parts of the schedule's time, from clean latents (0) to noise (1)",
        "samples": f"from the weights' moving average, in {config.num_sampling_steps} steps, with the same noise seeds",
        "what it does not say": "how good an autoencoder's pictures are: latents that hold less are easier. Read it "
        "along with the report of mg-benchmark",
    }


def _write(folder: Path, results: dict[str, dict], protocol: dict[str, str], config: LatentBenchmarkConfig) -> None:
    bands = next((list(result["bands"]) for result in results.values() if "bands" in result), [])
    rows = []
    for label, result in results.items():
        found = {**result, "model": label, "status": "error" if "error" in result else "ok"}
        figures = [found.get(name, "") for name in COLUMNS] + [found.get("bands", {}).get(band, "") for band in bands]
        rows.append([*figures, found.get("error", "")])
    Table(folder / "results.csv", [*COLUMNS, *bands, "error"], rows)
    summary = {"models": results, "protocol": protocol, "settings": to_dict(config)}
    with atomic_write(folder / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_report(folder / "report.html", results, protocol, folder)
