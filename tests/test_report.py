"""The report of a benchmark: one page that needs nothing else, says what was found and what was not, and plays."""

import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser

import numpy as np
import pytest

from mg.benchmark.report import ERROR_MAP, ORIGINAL, RECONSTRUCTION, choose_clips, clip_file, write_report
from mg.benchmark.results import ResultRow
from mg.data.video import read_image, write_image, write_video

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")


def make_row(name: str, model: str, psnr: float, frames: int = 6) -> ResultRow:
    size = dict(frames=frames, height=32, width=32, fps=12.0)
    figures = dict(psnr=psnr, ssim=psnr / 40, flolpips=0.1 if frames > 1 else None)
    return ResultRow(name, name.removesuffix(".mp4").replace("/", "_"), model, "ok", **size, **figures)


def make_summary(
    rows: list[ResultRow], models: list[str], failures: dict | None = None, left_out: dict | None = None
) -> dict:
    """What a benchmark would say of the rows."""
    failures, left_out = failures or {}, left_out or {}
    summary = {"videos": len({row.name for row in rows} | set(failures)), "models": {}, "left_out": left_out}
    for number, label in enumerate(models):
        good = [row for row in rows if row.model == label]
        taken = {name: [getattr(row, name) for row in good] for name in ("psnr", "ssim", "flolpips")}
        means = {name: float(np.mean(values)) for name, values in taken.items() if values and None not in values}
        compression = {"ratio": 96.0 * (number + 1), "values_per_pixel": 0.03, "cell": "8x8x8", "channels": 16}
        summary["models"][label] = {
            "dtype": "fp32",
            "checkpoint": f"{label}.ckpt",
            "succeeded": len(good),
            "failed": len(failures),
            "failures": [{"name": name, "error": error} for name, error in failures.items()],
            "mean": means,
            "encode_frames_per_second": 12.5 if good else None,
            "decode_frames_per_second": None,
            "compression": compression if good else None,
            "peak_memory": {"bytes": 3 * 2**30, "of": "device"} if good else None,
        }
    described = {
        "measures": {"psnr": "dB"},
        "protocol": {"clips": "all frames"},
        "machine": {"device": "cpu"},
        "flow": "dis",
    }
    return {**summary, **described}


def write_clips(folder, rows: list[ResultRow]) -> None:
    """Moving bars, of another colour per model."""
    for number, row in enumerate(rows):
        t, y, x = np.meshgrid(np.arange(row.frames), np.arange(32), np.arange(32), indexing="ij")
        frames = np.stack([(x * 8 + 20 * t) % 256, y * 8, x * 0 + 40 * (number % 6)], axis=-1).astype(np.uint8)
        for kind in (ORIGINAL, RECONSTRUCTION, ERROR_MAP):
            if row.frames == 1:
                write_image(clip_file(folder, row, kind), frames[0])
            else:
                write_video(clip_file(folder, row, kind), frames, row.fps)


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and tags that were not closed."""

    VOID = {"meta", "link", "img", "input", "br", "line", "circle"}

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


@pytest.fixture
def make(tmp_path):
    def make(rows, models, **told) -> Page:
        write_clips(tmp_path / "clips", rows)
        write_report(tmp_path / "report.html", make_summary(rows, models, **told), rows, tmp_path / "clips")
        page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
        assert not page.open
        return page

    return make


MODELS = ["one", "two"]
ROWS = [make_row(f"v{i}.mp4", model, 20 + i + 5 * j) for j, model in enumerate(MODELS) for i in range(5)]


def test_table_plots_and_three_clips_are_there(make):
    page = make(ROWS, MODELS)
    for text in ("22.00", "27.00", "96:1", "192:1", "12.5", "3.00 GiB", "5 of 5", "2 models, 5 videos: all frames"):
        assert text in page.text
    assert sum(attributes.get("class") == "plot" for _, attributes in page.elements) == 6
    sections = [attributes for tag, attributes in page.elements if tag == "section"]
    assert [section["data-frames"] for section in sections] == ["6"] * 3
    assert page.count("video") == 3 * (1 + 2 * 2) and page.count("img") == 0
    for title in ("Worst: v0.mp4", "Median: v2.mp4", "Best: v4.mp4"):
        assert title in page.text
    assert page.text.count("two: 29.00, v4.mp4") == 1  # a point of the plot says which video it is
    assert page.text.count("FloLPIPS") == page.text.count("FloLPIPS (dis)") > 3  # never without its flow


def test_the_same_results_make_the_same_page_in_which_no_two_elements_share_an_id(make, tmp_path):
    page = make(ROWS, MODELS)
    before = (tmp_path / "report.html").read_bytes()
    make(ROWS, MODELS)
    assert (tmp_path / "report.html").read_bytes() == before
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    used = {attributes["xlink:href"][1:] for tag, attributes in page.elements if tag == "use"}
    assert used and used <= set(ids) and len(ids) == len(set(ids))


def test_nothing_is_loaded_from_anywhere(make, tmp_path):
    page = make(ROWS, MODELS)
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", (tmp_path / "report.html").read_text())
    assert "://" not in text and "url(" not in text and "@import" not in text
    sources = [a[key] for _, a in page.elements for key in ("src", "href", "data", "poster") if key in a]
    assert sources and all(source.startswith("data:") for source in sources)
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_names_and_errors_are_text_and_never_markup(make):
    bad = '<script>alert("1")</script>&amp;.mp4'
    rows = [make_row("a<b>&.mp4", '"><i>x', 20), make_row("c.mp4", '"><i>x', 30)]
    rows[0].output, rows[1].output = "a", "c"
    page = make(rows, ['"><i>x'], failures={bad: "cannot <read>"}, left_out={"lpips": "no <weights> & co"})
    assert page.count("script") == 1 and page.count("i") == page.count("b") - 1 - 4 == 0
    for text in (bad, "a<b>&.mp4", '"><i>x', "cannot <read>", "no <weights> & co"):
        assert text in page.text


def test_worst_median_and_best_are_chosen_among_the_clips_that_most_models_took(tmp_path):
    rows = [*ROWS, make_row("alone.mp4", "one", 1.0)]
    assert choose_clips(rows, tmp_path) == []  # no pictures
    write_clips(tmp_path, rows)
    chosen = {title: group[0].name for title, group in choose_clips(rows, tmp_path)}
    assert chosen == {"Worst": "v0.mp4", "Median": "v2.mp4", "Best": "v4.mp4"}
    assert [title for title, _ in choose_clips(rows[:2], tmp_path)] == ["Worst", "Best"]
    assert [title for title, _ in choose_clips(rows[:1], tmp_path)] == ["The only clip"]
    clip_file(tmp_path, rows[0], ERROR_MAP).unlink()
    assert choose_clips(rows[:1], tmp_path) == []


def test_one_model_and_one_clip_make_a_report(make):
    page = make(ROWS[:1], ["one"])
    assert "The only clip: v0.mp4" in page.text and page.count("video") == 3
    assert "1 model, 1 video" in page.text


def test_without_any_success_the_report_says_why(make):
    page = make([], ["one"], failures={"a.mp4": "the file is empty"})
    assert "No clip was reconstructed." in page.text and "There are no pictures of any clip." in page.text
    assert "the file is empty" in page.text and page.count("section") == page.count("video") == 0


def test_images_are_shown_as_images_and_need_no_player(make):
    page = make([make_row("still.png", "one", 20, frames=1), make_row("v.mp4", "one", 30)], ["one"])
    assert page.count("img") == 3 and page.count("video") == 3 and page.count("button") == 1


def test_very_many_models_and_equal_figures_still_have_plots(make):
    models = [f"model {i}" for i in range(20)]
    page = make([make_row("v.mp4", model, 20.0) for model in models], models)
    assert page.count("rect") > 0 and "nan" not in page.text.lower()


# In a browser.


@needs_chromium
def test_chromium_shows_the_report_without_a_complaint(make, tmp_path):
    make(ROWS, MODELS, failures={"<b>.mp4": "empty & broken"}, left_out={"lpips": "no weights"})
    assert console(tmp_path, "<script>console.error('heard'); missing.call();</script>", "Uncaught")[0] == "heard"
    found = console(tmp_path, "")
    assert found == []
    shown = read_image(tmp_path / "screen.png")
    assert shown.shape == (2400, 1280, 3)
    colors = np.unique(shown[::4, ::4].reshape(-1, 3), axis=0)
    assert len(colors) > 500  # plots, text and the videos' first frames; an empty page has one
    assert shown[1200:].std() > 20


PROBE = """<script>
const clip = document.querySelector(".clip"), videos = [...clip.querySelectorAll("video")];
const scrub = clip.querySelector(".scrub"), button = clip.querySelector(".play");
const times = () => videos.map(video => video.currentTime.toFixed(4)).join(" ");
addEventListener("load", () => {
  scrub.value = 4;
  scrub.dispatchEvent(new Event("input"));
  setTimeout(() => {
    console.log("frame " + clip.querySelector(".frame").textContent + " at " + times());
    clip.querySelector(".speed").value = "0.25";
    button.click();
  }, 300);
  for (let i = 1; i <= 8; i++) setTimeout(() => console.log("playing " + times()), 500 + 100 * i);
  setTimeout(() => { button.click(); console.log("paused " + videos.every(video => video.paused)); }, 1500);
});
</script>"""


@needs_chromium
def test_in_chromium_the_videos_of_a_clip_play_in_step(make, tmp_path):
    make(ROWS, MODELS)
    said = console(tmp_path, PROBE, until="paused")
    assert said[0] == "frame 4 at " + " ".join(["0.3750"] * 5)  # the middle of frame 4, at 12 per second
    assert said[-1] == "paused true"
    played = [[float(time) for time in line.split()[1:]] for line in said[1:-1]]
    assert len(played) == 8 and len({times[0] for times in played}) > 4
    apart = [max(times) - min(times) for times in played]
    assert np.median(apart) < 0.5 / 12


def console(folder, probe: str, until: str | None = None) -> list[str]:
    """What the page, with a probe in it, writes to the console while a screenshot is taken, or `until` it says so."""
    page = folder / "probed.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", f"{probe}</body>"))
    stay = ["--remote-debugging-port=0"] if until else [f"--screenshot={folder / 'screen.png'}"]
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--mute-audio",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1280,2400",
        "--enable-logging=stderr",
        "--v=0",
        *stay,
        page.as_uri(),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, errors="replace")
    watch = threading.Timer(60, process.kill)
    watch.start()
    said = []
    try:
        for line in process.stderr:
            found = re.search(r':CONSOLE[:(]\d+\)?\] "(.*)", source: ', line)
            if found:
                said.append(found[1])
            if until and said and said[-1].startswith(until):
                break
    finally:
        watch.cancel()
        process.kill()
        process.wait()
    return said
