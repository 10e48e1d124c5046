"""Cleaning of captions: the original's results, and what it takes."""

import json
import sys
from pathlib import Path

import pytest

from mg.text import clean_caption

CASES = json.loads((Path(__file__).parent / "data" / "text" / "cleaning.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", CASES)
def test_a_caption_is_cleaned_as_by_the_original_twice(text):
    assert clean_caption(text, times=2) == CASES[text]


@pytest.mark.parametrize(
    "text, once",
    [
        ("caf&eacute; &amp; bar&foo; &#65;&#150;z", "café bar foo A-z"),
        ("<!-- no --><script>no()</script>a<style>p {}</style> dog<br/>runs", "a dogruns"),
        ("it was â€œquoted", 'it was "quoted'),
        ("ﬁne Ｆｕｌｌ width", "fine full width"),
        ("a\tcat\r\nruns", "a cat runs"),
        ("", ""),
    ],
)
def test_what_html_and_broken_encodings_become(text, once):
    assert clean_caption(text) == once


def test_the_second_time_finds_more():
    assert [clean_caption("a cat,,", times) for times in (1, 2)] == ["a cat,", "a cat"]


def test_ascii_needs_no_ftfy_and_other_letters_say_that_they_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_caption("A  Cat\t at https://cats.com", times=2) == "a cat at"
    with pytest.raises(ValueError, match="needs ftfy: pip install ftfy"):
        clean_caption("a café")
