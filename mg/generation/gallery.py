"""All samples of a folder as one page to look at: prompt, settings, seed, the clip, what it was given, and clips that a
network was trained on under the same caption.

Pictures are part of the page, which opens anywhere, as long as they are not too many; the others are named.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from mg.benchmark.page import definitions, figure, html_template, nothing, section, write_page
from mg.generation.samples import OK, SampleRow

MOST_BYTES = 200 * 2**20  # of pictures in the page
_EMPTY: tuple = (None, "", [], {})


def write_gallery(folder: Path, rows: Sequence[SampleRow], beside: Mapping[str, Sequence[Path]] | None = None) -> None:
    """Write index.html into a folder of samples.

    Args:
        beside: clips to show beside the samples of a prompt.
    """
    done, failed = [row for row in rows if row.status == OK], [row for row in rows if row.status != OK]
    left, clips = MOST_BYTES, []
    for row in done:
        files = [path for path in (folder / name for name in (row.file, *row.pictures)) if path.is_file()]
        others = list((beside or {}).get(row.prompt, [])) if files else []
        left -= sum(path.stat().st_size for path in (*files, *others))
        clips.append(_clip(row, files, others) if left >= 0 else _clip(row, [], []))
    content = html_template("mg.generation", "gallery.html").substitute(
        subtitle=f"{len(done)} {'sample' if len(done) == 1 else 'samples'}",
        clips="".join(clips) or nothing("There are none."),
        failures=_failures(failed),
    )
    write_page(folder / "index.html", "Samples", content)


def _clip(row: SampleRow, files: Sequence[Path], others: Sequence[Path]) -> str:
    shape = f"{row.frames} {'frame' if row.frames == 1 else 'frames'} of {row.height} x {row.width}"
    rate = f", {row.fps:g} frames per second" if row.frames > 1 else ""
    head = f"<h3>{escape(row.prompt) or '(no prompt)'} <small>{escape(row.name)}</small></h3>"
    titles = ["sample", *(f"reference {number}" for number in range(len(row.pictures)))]
    figures = [figure(path, title, f"{shape}{rate}" if title == "sample" else "") for path, title in zip(files, titles)]
    figures += [figure(path, "trained on", path.name) for path in others]
    if not figures:
        figures = [nothing(f"{row.file}, {shape}{rate}: not in this page, which would grow too large, or not there")]
    told = {name: _said(value) for name, value in row.settings.items() if value not in _EMPTY}
    details = f"<details><summary>settings</summary>{definitions(told)}</details>"
    seed = f'<p class="muted">seed {row.settings.get("seed")}, {row.seconds:.1f} s</p>'
    return section(head + seed, figures, row.frames if files else 1, row.fps) + details


def _said(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(inner)}" for name, inner in value.items() if inner not in _EMPTY)
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _failures(rows: Sequence[SampleRow]) -> str:
    if not rows:
        return nothing("None.")
    cells = ((row.name, row.prompt, row.error) for row in rows)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>" for texts in cells)
    head = "<tr><th>Sample</th><th>Prompt</th><th>What was wrong</th></tr>"
    return f'<table class="texts"><thead>{head}</thead><tbody>{body}</tbody></table>'
