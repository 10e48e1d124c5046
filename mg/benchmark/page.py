"""Parts of a self-contained HTML page: clips that play in sync, lists, and the page around them.

The page template is page.html next to this file. Pictures are embedded, and the content security policy blocks
loading anything else.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from mg.checkpoints import atomic_write
from mg.plain_text import write_text

_CONTROLS = Template(
    '<div class="controls"><button type="button" class="play">Play</button>'
    '<input type="range" class="scrub" min="0" max="$last" value="0" step="1" aria-label="frame">'
    '<output class="frame">0</output>'
    '<label>speed <select class="speed"><option value="1">1</option><option value="0.5">1/2</option>'
    '<option value="0.25">1/4</option><option value="0.125">1/8</option></select></label></div>'
)


def html_template(package: str, file: str) -> Template:
    """A file of a package with $names to fill in."""
    return Template(resources.files(package).joinpath(file).read_text(encoding="utf-8"))


def write_page(path: Path, title: str, content: str) -> None:
    """Write a page, whole or not at all."""
    page = html_template("mg.benchmark", "page.html").substitute(title=escape(title), content=content)
    with atomic_write(path) as temporary:
        write_text(temporary, page)


def section(head: str, figures: Sequence[str], frames: int, fps: float) -> str:
    """A clip: figures side by side, and for videos the controls that play them in sync."""
    controls = _CONTROLS.substitute(last=frames - 1) if frames > 1 else ""
    data = f'data-fps="{fps:g}" data-frames="{frames}"'
    return f'<section class="clip" {data}>{head}<div class="panels">{"".join(figures)}</div>{controls}</section>'


def figure(content: Path | str, name: str, text: str) -> str:
    """A picture, or ready HTML, with a name and a text below."""
    shown = media(content) if isinstance(content, Path) else content
    return f"<figure>{shown}<figcaption><b>{escape(name)}</b> {escape(text)}</figcaption></figure>"


def media(path: Path) -> str:
    """A .png or .mp4, embedded in the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    if path.suffix == ".png":
        return f'<img alt="" src="data:image/png;base64,{data}">'
    return f'<video muted playsinline preload="auto" src="data:video/mp4;base64,{data}"></video>'


def definitions(entries: Mapping[str, str]) -> str:
    """A definition list of names and texts."""
    items = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries.items())
    return f"<dl>{''.join(items)}</dl>"


def nothing(text: str) -> str:
    """A placeholder text."""
    return f'<p class="muted">{escape(text)}</p>'
