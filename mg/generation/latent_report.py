"""The report of `mg.generation.latent_benchmark`: a standalone HTML file with a table, plots and samples.

Its content is latent_report.html next to this file, in a page made by `mg.benchmark.page`.
"""

from html import escape
from itertools import zip_longest
from pathlib import Path

from mg.benchmark.page import definitions, figure, html_template, nothing, section, write_page
from mg.benchmark.plots import Point, chip, legend, line_plot, rate_plot

_HEADS = (
    "Autoencoder", "Share of the mean's loss \N{DOWNWARDS ARROW}", "Untrained", "Loss", "Compression",
    "Values per pixel", "Latents", "Tokens", "Patch", "Parameters", "Updates",
)  # fmt: skip
_TIMES = "\N{MULTIPLICATION SIGN}"


def write_report(path: Path, results: dict[str, dict], protocol: dict[str, str], folder: Path) -> None:
    """Write the report atomically.

    Args:
        results: autoencoder label -> results.
        protocol: how they were measured.
        folder: folder that the samples' paths are relative to.
    """
    good = {label: result for label, result in results.items() if "error" not in result}
    content = html_template("mg.generation", "latent_report.html").substitute(
        subtitle=escape(f"{len(results)} autoencoders, {protocol['training']}: {protocol['clips']}"),
        table=_table(results),
        failures=_failures(results),
        legend=legend(list(results)),
        plots=_plots(results) if good else nothing("No training succeeded."),
        samples=_samples(good, folder) or nothing("There are no samples."),
        protocol=definitions(protocol),
    )
    write_page(path, "Autoencoders: how well a denoiser learns on their latents", content)


def _table(results: dict[str, dict]) -> str:
    shares = [result["share"] for result in results.values() if "share" in result]
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(head)}</th>' for head in _HEADS) + "</tr>"]
    for number, (label, result) in enumerate(results.items()):
        head = f'<th scope="row">{chip(number)}{escape(label)} <small>{escape(str(result["name"]))}</small></th>'
        cells = ["\N{EN DASH}"] * (len(_HEADS) - 1)
        if "error" not in result:
            share = f"{result['share']:.3f}"
            cells = [f"<strong>{share}</strong>" if len(shares) > 1 and result["share"] == min(shares) else share]
            cells += [f"{result['share_untrained']:.3f}", f"{result['loss']:.4f}", f"{result['compression']:.4g}:1"]
            cells += [f"{result['values_per_pixel']:.4g}"]
            cells += [result[name].replace("x", _TIMES) for name in ("latents", "tokens", "patch")]
            cells += [f"{result['parameters']:,}", f"{result['updates']:,}"]
        lines.append(f"<tr>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"


def _failures(results: dict[str, dict]) -> str:
    lines = [(label, result["error"]) for label, result in results.items() if "error" in result]
    lines += [(label, error) for label, result in results.items() for error in result.get("failed_samples", [])]
    if not lines:
        return ""
    items = "".join(f"<li><b>{escape(label)}</b>: {escape(error)}</li>" for label, error in lines)
    return f'<div class="note"><p>Failed:</p><ul>{items}</ul></div>'


def _plots(results: dict[str, dict]) -> str:
    updates = max(result.get("updates", 0) for result in results.values())

    def curve(name: str) -> list[list[Point]]:
        """A line per autoencoder, also for failed ones, to keep colours and shapes consistent."""
        lines = []
        for label, result in results.items():
            shares = [(step, loss / result["baseline"]) for step, loss in result.get(name, [])]
            lines.append([Point(step, share, f"{label}: {share:.3f} after {step} updates") for step, share in shares])
        return lines

    bands = []
    for label, result in results.items():
        found = [(name, loss / result["baseline"]) for name, loss in result.get("bands", {}).items()]
        middles = [(place + 0.5) / len(found) for place in range(len(found))]
        bands.append([Point(t, share, f"{label}: {share:.3f} at {name}") for t, (name, share) in zip(middles, found)])
    rates = []
    for number, (label, result) in enumerate(results.items()):
        if "share" in result:
            ratio, share = result["compression"], result["share"]
            rates.append((number, Point(ratio, share, f"{label}: {share:.3f} at {ratio:.4g}:1")))
    share, over = "share of the mean's loss \N{DOWNWARDS ARROW}", (0, max(updates, 1))
    return "".join(
        [
            line_plot(f"Held-out clips: {share}", "updates", curve("validation"), 0.05, over, x_texts=True),
            line_plot(f"Training: {share}", "updates", curve("training"), 0.05, over, 2, x_texts=True),
            line_plot(f"Held-out clips, by time: {share}", "0 clean, 1 noise", bands, 0.05, (0, 1), x_texts=True),
            rate_plot(
                f"Over compression: {share}",
                "values of the video / values of the latents",
                rates,
                0.05,
            ),
        ]
    )


def _samples(results: dict[str, dict], folder: Path) -> str:
    """A row of clips per seed."""
    sections = []
    by_seed = zip_longest(*(result["samples"] for result in results.values()))
    for number, files in enumerate(by_seed):
        clips = {label: folder / file for label, file in zip(results, files) if file and (folder / file).is_file()}
        if clips:
            first = next(iter(results.values()))
            figures = [figure(path, label, "") for label, path in clips.items()]
            sections.append(section(f"<h3>Sample {number + 1}</h3>", figures, first["frames"], first["fps"]))
    return "".join(sections)
