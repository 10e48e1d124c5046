"""Cleaning of captions, as DeepFloyd IF, PixArt and Open-Sora clean prompts before T5 reads them.

What web pages leave in captions goes: links, tags, numbers of articles, names of files. The steps and their order are
the original's, oddities included, since released models were asked in such words; where it repeats itself, or a step
can find nothing, that is left out.

ftfy (extra `text`) mends broken encodings and unusual letters; a caption of plain ASCII, which it would leave as it is,
takes none.
"""

import html
import re
from html.entities import html5
from html.parser import HTMLParser
from urllib.parse import unquote_plus

_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
_DASHES += "\ufe31\ufe32\ufe58\ufe63\uff0d"
_SITE = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"

Step = tuple[re.Pattern, str]


def _steps(*steps: tuple[str, str]) -> tuple[Step, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in steps)


_LINKS = _steps(
    ("<person>", "person"),  # a stand-in for names in some data sets, and no tag
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_SITE})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_SITE})", ""),
)
_SIGNS = _steps(
    (r"@\w+\b", ""),  # names of users
    ("[\u31c0-\u9fff]+", ""),  # Chinese characters, and enclosed ones
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4«»“”¨]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),  # numbers of articles, down to the next file name
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\][}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINTS = re.compile("[-_]")
_PLAIN = re.compile(r"[\t\n\r -%'-~]*")  # which ftfy and HTML's unescaping leave as it is
_WORDS = _steps(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # 1920x1080, by a Latin, a Cyrillic x or a cross
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),  # one pair of quotes around all
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(text: str, times: int = 1) -> str:
    """A caption without what web pages leave in captions, in lower case; "" where nothing is left, as of Chinese.

    Args:
        times: how often it is cleaned; Open-Sora cleans prompts twice, and the second time finds more.

    Raises:
        ValueError: the caption takes ftfy, which is not installed.
    """
    for _ in range(times):
        text = _clean(text)
    return text


def _clean(text: str) -> str:
    text = _take(_LINKS, unquote_plus(text).strip().lower())
    text = _take(_SIGNS, _without_tags(text))
    if len(_JOINTS.findall(text)) > 3:  # this-is-my-cute-cat
        text = _JOINTS.sub(" ", text)
    return _take(_WORDS, _mended(text)).strip()


def _take(steps: tuple[Step, ...], text: str) -> str:
    for pattern, replacement in steps:
        text = pattern.sub(replacement, text)
    return text


def _mended(text: str) -> str:
    if _PLAIN.fullmatch(text):
        return text.strip()
    try:
        import ftfy
    except ImportError:
        raise ValueError("cleaning captions of other letters than ASCII's takes ftfy: pip install ftfy") from None
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _without_tags(text: str) -> str:
    reader = _Text()
    reader.feed(text)
    reader.close()
    return "".join(reader.parts)


class _Text(HTMLParser):
    """The text of a page, as BeautifulSoup has it by this parser: without tags, comments, scripts, styles."""

    _SILENT = ("script", "style", "template")

    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self._within: list[str] = []  # silent tags that are open

    def handle_starttag(self, tag, attrs):
        if tag in self._SILENT:
            self._within.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag in self._within:
            self._within.remove(tag)

    def handle_data(self, data):
        if not self._within:
            self.parts.append(data)

    def handle_charref(self, name):
        self.handle_data(html.unescape(f"&#{name};"))

    def handle_entityref(self, name):
        self.handle_data(html5.get(f"{name};", f"&{name}"))

    def unknown_decl(self, data):
        if data.upper().startswith("CDATA["):
            self.handle_data(data[len("CDATA[") :])
