"""Caption cleaning, as DeepFloyd IF, PixArt and Open-Sora clean prompts for T5.

It removes the leftovers of web pages: links, tags, article numbers, file names. The steps and their order are the
original's, oddities included, since released models expect prompts cleaned this way; only repeated steps and steps that
can never match are left out.

ftfy (extra `text`) repairs broken encodings and unusual characters; plain ASCII, which it wouldn't change, doesn't need
it.
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
    ("<person>", "person"),  # a placeholder for names in some data sets, not a tag
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_SITE})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_SITE})", ""),
)
_SIGNS = _steps(
    (r"@\w+\b", ""),  # user names
    ("[\u31c0-\u9fff]+", ""),  # Chinese characters, including enclosed ones
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4«»“”¨]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),  # article numbers, up to the file names below
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\][}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINTS = re.compile("[-_]")
_PLAIN = re.compile(r"[\t\n\r -%'-~]*")  # unchanged by ftfy and HTML unescaping
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
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # 1920x1080, with a Latin or Cyrillic x or a multiplication sign
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),  # quotes around the whole text
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(text: str, times: int = 1) -> str:
    """A caption without leftovers of web pages, in lower case; "" if nothing is left, as for Chinese.

    Args:
        times: how often to clean it; Open-Sora cleans prompts twice, and the second pass finds more.

    Raises:
        ValueError: the caption needs ftfy, which is not installed.
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
        raise ValueError("cleaning captions that are not plain ASCII needs ftfy: pip install ftfy") from None
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _without_tags(text: str) -> str:
    reader = _Text()
    reader.feed(text)
    reader.close()
    return "".join(reader.parts)


class _Text(HTMLParser):
    """The text of a page as BeautifulSoup extracts it with this parser: without tags, comments, scripts, styles."""

    _SILENT = ("script", "style", "template")

    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self._within: list[str] = []  # open silent tags

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
