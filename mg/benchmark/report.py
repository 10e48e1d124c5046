"""A benchmark report as one self-contained HTML file: a table, plots, and clips that play in sync.

The template is report.html next to this file; the page around it comes from `mg.benchmark.page`, the plots from
`mg.benchmark.plots`.
"""

from html import escape
from pathlib import Path

from mg.benchmark.page import definitions, figure, html_template, media, nothing, section, write_page
from mg.benchmark.plots import Point, chip, legend, line_plot, rate_plot
from mg.benchmark.results import ResultRow

# The kinds of pictures kept for a clip.
ORIGINAL = "original"
RECONSTRUCTION = "reconstruction"
ERROR_MAP = "error_map"

# The difference (of values in [0, 1]) that is brightest in an error map.
ERROR_MAP_RANGE = 0.2

# name -> title, unit, whether higher is better, and the minimum extent of its axis.
MEASURES = {
    "psnr": ("PSNR", "dB", True, 1.0),
    "ssim": ("SSIM", "", True, 0.01),
    "lpips": ("LPIPS", "", False, 0.01),
    "flolpips": ("FloLPIPS", "", False, 0.01),
}
ARROWS = {True: "\N{UPWARDS ARROW}", False: "\N{DOWNWARDS ARROW}"}  # the direction of better values
NOTHING = "\N{EN DASH}"


def clip_file(folder: Path, row: ResultRow, kind: str) -> Path:
    """The path of a picture of a row's clip: an image for a single frame, otherwise a video."""
    of_kind = folder / kind if kind == ORIGINAL else folder / kind / row.model
    return of_kind / f"{row.output}{'.png' if row.frames == 1 else '.mp4'}"


def write_report(path: Path, summary: dict, rows: list[ResultRow], clips: Path) -> None:
    """Write the report of a benchmark, whole or not at all.

    Args:
        summary: the contents of summary.json.
        rows: of all models and videos.
        clips: the folder in which `clip_file` finds pictures; a clip without them is not shown.
    """
    labels, flow = list(summary["models"]), summary["flow"]
    measured = [name for name in MEASURES if any(name in model["mean"] for model in summary["models"].values())]
    content = html_template("mg.benchmark", "report.html").substitute(
        subtitle=escape(_subtitle(summary)),
        table=_table(summary, measured),
        left_out=_left_out(summary["left_out"], flow),
        legend=legend(labels),
        rates="".join(_rate_plot(summary, name) for name in measured) or nothing("No clip was reconstructed."),
        videos="".join(_video_plot(rows, labels, name, flow) for name in measured)
        or nothing("No clip was reconstructed."),
        clips="".join(_clip(title, group, clips, flow) for title, group in choose_clips(rows, clips))
        or nothing("There are no pictures of any clip."),
        error_range=f"{ERROR_MAP_RANGE:g}",
        failures=_failures(summary["models"]),
        protocol=definitions(
            {_title(name, flow): text for name, text in {**summary["measures"], **summary["protocol"]}.items()}
        ),
        models=definitions({label: _described(model) for label, model in summary["models"].items()}),
        machine=escape(", ".join(f"{key} {value}" for key, value in summary["machine"].items())),
    )
    write_page(path, "Video autoencoders: benchmark", content)


def choose_clips(rows: list[ResultRow], clips: Path) -> list[tuple[str, list[ResultRow]]]:
    """The worst, median and best clip by mean PSNR over models: a title and the rows of each.

    Considers the clips with pictures that the most models reconstructed; returns fewer than three if there are fewer.
    """
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        kinds = (ORIGINAL, RECONSTRUCTION, ERROR_MAP)
        if row.ok and row.psnr is not None and all(clip_file(clips, row, kind).is_file() for kind in kinds):
            groups.setdefault(row.output, []).append(row)
    most = max(map(len, groups.values()), default=0)
    ranked = sorted((group for group in groups.values() if len(group) == most), key=_mean_psnr)
    if len(ranked) == 1:
        return [("The only clip", ranked[0])]
    picked = {"Worst": 0, "Median": (len(ranked) - 1) // 2, "Best": len(ranked) - 1} if ranked else {}
    if len(ranked) == 2:
        del picked["Median"]
    return [(title, ranked[place]) for title, place in picked.items()]


def _mean_psnr(group: list[ResultRow]) -> float:
    return sum(row.psnr for row in group) / len(group)


# Text and tables.


def _subtitle(summary: dict) -> str:
    models, videos = len(summary["models"]), summary["videos"]
    counted = f"{models} {'model' if models == 1 else 'models'}, {videos} {'video' if videos == 1 else 'videos'}"
    return f"{counted}: {summary['protocol']['clips']}"


def _table(summary: dict, measured: list[str]) -> str:
    models = summary["models"]
    best = {}
    for name in measured:
        means = {label: model["mean"][name] for label, model in models.items() if name in model["mean"]}
        if len(means) > 1:
            best[name] = (max if MEASURES[name][2] else min)(means.values())
    heads = ["Model", *(_axis(name, summary["flow"]) for name in measured)]
    heads += ["Compression", "Encode frames/s", "Decode frames/s", "Peak memory", "Videos", "Failures"]
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(head)}</th>' for head in heads) + "</tr>"]
    for number, (label, model) in enumerate(models.items()):
        cells = [_sized(model["mean"].get(name), name, best.get(name)) for name in measured]
        cells += [_compression(model["compression"]), _speed(model["encode_frames_per_second"])]
        cells += [_speed(model["decode_frames_per_second"]), _memory(model["peak_memory"])]
        cells += [f"{model['succeeded']} of {summary['videos']}", _failed(model)]
        dtype = f" <small>{escape(model['dtype'])}</small>" if "dtype" in model else ""
        head = f'<th scope="row">{chip(number)}{escape(label)}{dtype}</th>'
        lines.append(f"<tr>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"


def _sized(value: float | None, name: str, best: float | None) -> str:
    if value is None:
        return NOTHING
    text = _figure(value, name)
    return f"<strong>{text}</strong>" if value == best else text


def _figure(value: float, name: str) -> str:
    return f"{value:.2f}" if name == "psnr" else f"{value:.4f}"


def _compression(found: dict | None) -> str:
    if found is None:
        return NOTHING
    times = "\N{MULTIPLICATION SIGN}"
    cell = escape(found["cell"]).replace("x", times)
    return f"{found['ratio']:.4g}:1 <small>{cell}, {found['channels']} channels</small>"


def _speed(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def _memory(found: dict | None) -> str:
    if found is None:
        return NOTHING
    return f"{found['bytes'] / 2**30:.2f} GiB <small>{escape(found['of'])}</small>"


def _failed(model: dict) -> str:
    if "error" in model:
        return "<strong>not built</strong>"
    return str(model["failed"])


def _left_out(left_out: dict[str, str], flow: str) -> str:
    if not left_out:
        return ""
    items = "".join(f"<li><b>{escape(_title(name, flow))}</b>: {escape(why)}</li>" for name, why in left_out.items())
    return f'<div class="note"><p>Left out:</p><ul>{items}</ul></div>'


def _title(name: str, flow: str) -> str:
    """A measure's name, with the optical flow estimator if it uses one."""
    title = MEASURES[name][0] if name in MEASURES else name
    return f"{title} ({flow})" if name == "flolpips" else title


def _failures(models: dict[str, dict]) -> str:
    lines = [(label, f) for label, model in models.items() for f in model["failures"]]
    if not lines:
        return nothing("None.")
    cells = ((label, failure["name"], failure["error"]) for label, failure in lines)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>" for texts in cells)
    head = "<tr><th>Model</th><th>Video</th><th>What was wrong</th></tr>"
    return f'<table class="texts"><thead>{head}</thead><tbody>{body}</tbody></table>'


def _described(model: dict) -> str:
    keys = ("name", "checkpoint", "sha256", "dtype", "tiling", "device", "mode", "resolutions")
    return ", ".join(f"{key} {model[key]}" for key in keys if model.get(key))


# Plots.


def _rate_plot(summary: dict, name: str) -> str:
    """A point per model: the mean of a measure over compression, on a logarithmic axis."""
    points = []
    for number, (label, model) in enumerate(summary["models"].items()):
        if name in model["mean"]:
            ratio, value = model["compression"]["ratio"], model["mean"][name]
            points.append((number, Point(ratio, value, f"{label}: {_figure(value, name)} at {ratio:.4g}:1")))
    title = f"{_axis(name, summary['flow'])} over compression"
    return rate_plot(title, "values of the video / values of the latents", points, MEASURES[name][3])


def _video_plot(rows: list[ResultRow], labels: list[str], name: str, flow: str) -> str:
    """A line per model over the videos, sorted by the mean over models."""
    found: dict[str, dict[str, ResultRow]] = {}
    for row in rows:
        if row.ok and getattr(row, name) is not None:
            found.setdefault(row.output, {})[row.model] = row
    groups = sorted(found.values(), key=lambda group: sum(getattr(row, name) for row in group.values()) / len(group))

    def point(place: int, label: str) -> Point:
        row = groups[place][label]
        value = getattr(row, name)
        return Point(place, value, f"{label}: {_figure(value, name)}, {row.name}")

    lines = [[point(place, label) for place, group in enumerate(groups) if label in group] for label in labels]
    title, order = f"{_axis(name, flow)} of every video", "videos, by increasing mean over models"
    radius = 3.5 if len(groups) <= 60 else 1.5
    return line_plot(title, order, lines, MEASURES[name][3], (-0.5, len(groups) - 0.5), radius)


def _axis(name: str, flow: str) -> str:
    _, unit, more_is_better, _ = MEASURES[name]
    return f"{_title(name, flow)}{f' ({unit})' if unit else ''} {ARROWS[more_is_better]}"


# Pictures.


def _clip(title: str, group: list[ResultRow], clips: Path, flow: str) -> str:
    row = group[0]
    shape = f"{row.frames} {'frame' if row.frames == 1 else 'frames'} of {row.height} x {row.width}"
    mean = "mean PSNR over models" if len(group) > 1 else "PSNR"
    figures = [figure(clip_file(clips, row, ORIGINAL), "original", "")]
    for row in group:
        measured = [
            f"{_title(name, flow)} {_figure(getattr(row, name), name)}"
            for name in MEASURES
            if getattr(row, name) is not None
        ]
        both = media(clip_file(clips, row, RECONSTRUCTION)) + media(clip_file(clips, row, ERROR_MAP))
        figures.append(figure(both, row.model, ", ".join(measured)))
    head = f"<h3>{escape(title)}: {escape(row.name)} <small>{mean} {_mean_psnr(group):.2f} dB, {shape}</small></h3>"
    return section(head, figures, row.frames, row.fps)
