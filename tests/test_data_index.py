"""The CSV index: what it may hold, and one clear line for what it may not."""

import sys
from types import SimpleNamespace

import pytest

from mg.data import DataError
from mg.data.index import read_index


def index(folder, text, encoding="utf-8", video_folder=None):
    path = folder / "set.csv"
    path.write_bytes(text.encode(encoding))
    return read_index(path, video_folder)


def test_rows_with_captions(tmp_path):
    rows = index(tmp_path, 'video,caption\na.mp4,"a cat, sitting"\nsub/b.mp4,\n')
    assert [(row.path, row.name, row.caption) for row in rows] == [
        (tmp_path / "a.mp4", "a.mp4", "a cat, sitting"),
        (tmp_path / "sub" / "b.mp4", "sub/b.mp4", ""),
    ]


@pytest.mark.parametrize("header", ["video,caption", "path,text", "id,text,video", " video , text "])
def test_columns_by_either_name(tmp_path, header):
    cells = {"video": "a.mp4", "path": "a.mp4", "caption": "x", "text": "x", "id": "7"}
    (row,) = index(tmp_path, f"{header}\n{','.join(cells[name.strip()] for name in header.split(','))}\n")
    assert (row.name, row.caption) == ("a.mp4", "x")


def test_captions_are_optional(tmp_path):
    assert index(tmp_path, "video\na.mp4\n")[0].caption == ""


def test_the_three_forms_of_the_originals_are_read(tmp_path):
    described = "path,text,num_frames,height,width,aspect_ratio,resolution,fps\n"
    described += 'a.mp4,"x, y",51,720,1280,0.5625,921600,23.976\nb.png,,1.0,480,640,0.75,307200,0\nc.mp4,,,,nan,,,\n'
    rows = index(tmp_path, described)
    sizes = [(row.num_frames, row.height, row.width, row.fps) for row in rows]
    assert sizes == [(51, 720, 1280, 23.976), (1, 480, 640, None), (None,) * 4]
    assert isinstance(rows[1].num_frames, int)
    for plain in ("video,caption\na.mp4,x\n", "path,text\na.mp4,x\n", "path\na.mp4\n"):
        (row,) = index(tmp_path, plain)
        assert (row.name, row.num_frames, row.height, row.width, row.fps) == ("a.mp4", *(None,) * 4)


@pytest.mark.parametrize(
    "column, value",
    [
        ("num_frames", "many"),
        ("num_frames", "1.5"),
        ("height", "-2"),
        ("width", "inf"),
        ("num_frames", "1e999"),
        ("fps", "-24"),
        ("fps", "24 fps"),
    ],
)
def test_a_wrong_size_or_frame_rate_is_named_with_its_line_and_column(tmp_path, column, value):
    message = f"set.csv, line 3: the column '{column}' is '{value}'; it must be a .*, or empty"
    with pytest.raises(DataError, match=message):
        index(tmp_path, f"path,{column}\na.mp4,\nb.mp4,{value}\n")


def test_byte_order_mark_crlf_blank_lines_and_other_scripts(tmp_path):
    rows = index(tmp_path, "video,caption\r\nвидео 1.mp4,猫\r\n\r\n", "utf-8-sig")
    assert [(row.name, row.caption) for row in rows] == [("видео 1.mp4", "猫")]


def test_paths_are_relative_to_the_video_folder(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    assert index(tmp_path, "video\nx/../a.mp4\n", video_folder=videos)[0].path == videos / "a.mp4"


def test_absolute_paths(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    inside = f"video\n{videos}/a.mp4\n"
    assert index(tmp_path, inside, video_folder=videos)[0].path == videos / "a.mp4"
    assert index(tmp_path, "video\n/elsewhere/a.mp4\n")[0].name == "/elsewhere/a.mp4"
    with pytest.raises(DataError, match="line 2: /elsewhere/a.mp4 leads outside"):
        index(tmp_path, "video\n/elsewhere/a.mp4\n", video_folder=videos)


@pytest.mark.parametrize("path", ["../a.mp4", "sub/../../a.mp4", "../videos_too/a.mp4"])
def test_paths_that_lead_outside_are_refused(tmp_path, path):
    videos = tmp_path / "videos"
    videos.mkdir()
    with pytest.raises(DataError, match="line 3: .*leads outside the folder"):
        index(tmp_path, f"video\nfine.mp4\n{path}\n", video_folder=videos)
    if not path.startswith("sub"):
        with pytest.raises(DataError, match="leads outside"):
            index(videos, f"video\n{path}\n")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty"),
        ("video,caption\n", "no row"),
        ("name,caption\na.mp4,x\n", "no column 'video' or 'path'; its columns are name, caption"),
        ("video,caption\na.mp4,x\n,y\n", "line 3: the column 'video' is empty"),
        ('video,caption\n"a.mp4,x\n', "line 2: its quotes do not match"),
        ('video,caption\na.mp4,x\nb.mp4,"He said "hi" to me"\nc.mp4,y\n', "line 3: its quotes do not match"),
        ('video,caption\r\na.mp4,"two\r\nlines"\r\n\r\nb.mp4,"open\r\nc.mp4,y\r\n', "line 5: its quotes do not match"),
        ('video,caption\na.mp4, "hi" there\n', "line 2: its quotes do not match"),
        (
            "video,caption\na.mp4,one, two\n",
            "line 2: there are 3 cells where the header has 2; a cell that holds a comma",
        ),
        ("video;caption\na.mp4;x\n", "columns are separated by semicolons; use commas"),
        ('"path"\t"text"\na.mp4\tx\n', "columns are separated by tabs; use commas"),
        ("path,text,path\na.mp4,x,b.mp4\n", "the column 'path' is there twice"),
        (",,\n", "empty"),
    ],
)
def test_faulty_index_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as error:
        index(tmp_path, text)
    assert "set.csv" in str(error.value)


@pytest.mark.parametrize(
    "encoding, message",
    [
        ("latin-1", "set.csv, line 3: not a CSV file in UTF-8 .*0xfc.*; write it as UTF-8, for example by: iconv"),
        ("gb18030", "set.csv, line 3: not a CSV file in UTF-8"),
        ("utf-16", "set.csv: not a CSV file in UTF-8 but in UTF-16; .*iconv -f UTF-16 -t UTF-8"),
        ("utf-16-le", "set.csv: not a CSV file in UTF-8 but in UTF-16"),
        ("utf-16-be", "set.csv: not a CSV file in UTF-8 but in UTF-16"),
    ],
)
def test_other_encodings_are_refused_with_the_line_and_what_helps(tmp_path, encoding, message):
    with pytest.raises(DataError, match=message):
        index(tmp_path, "video\na.mp4\nbücher.mp4\n", encoding)


def test_a_spreadsheet_is_not_taken_for_a_csv(tmp_path):
    (tmp_path / "set.csv").write_bytes(b"PK\3\4" + bytes(range(256)))
    with pytest.raises(DataError, match="set.csv: not a CSV file but a spreadsheet or an archive; save it as CSV"):
        read_index(tmp_path / "set.csv")


@pytest.mark.parametrize("sizes", ["0,0,0,nan", "0.0,0.0,0.0,", "-1,-1,-1,-1", "0,480,640,24", "NaN,None,0,<NA>"])
def test_a_row_whose_file_was_empty_is_counted_and_not_an_error(tmp_path, caplog, sizes):
    text = f"path,text,num_frames,height,width,fps\na.mp4,x,12,32,64,8\nbad.mp4,,{sizes}\n"
    good, bad = index(tmp_path, text)
    assert (good.num_frames, good.height, good.width, good.fps) == (12, 32, 64, 8)
    assert bad.name == "bad.mp4" and not (bad.num_frames and bad.height and bad.width)
    assert "set.csv: 1 of 2 rows say that their files are empty: bad.mp4" in caplog.text


def test_files_as_pandas_and_spreadsheets_write_them(tmp_path):
    pandas = ",path,text,num_frames,height,width,fps\n0,a.mp4,x,51.0,720.0,1280.0,29.97\n1,b.mp4,,nan,nan,nan,nan\n"
    assert [(row.name, row.caption, row.num_frames) for row in index(tmp_path, pandas)] == [
        ("a.mp4", "x", 51),
        ("b.mp4", "", None),
    ]
    sheet = "\ufeffpath,text,,\r\na.mp4,x,,\r\n,,,\r\n"
    assert [(row.name, row.caption) for row in index(tmp_path, sheet)] == [("a.mp4", "x")]
    assert [row.name for row in index(tmp_path, "path,text\ra.mp4,x\rb.mp4\r")] == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("text", ["a\0b", "a\u2028b\u2029c\x85d\x0be\x1cf", 'say ""hi""', "two\nlines", "x" * 200_000])
def test_captions_of_any_length_hold_anything(tmp_path, text):
    (first, second) = index(tmp_path, f'video,caption\na.mp4,"{text}"\nb.mp4,y\n')
    assert (first.caption, second.name) == (text.replace('""', '"'), "b.mp4")


# Parquet, by whichever library is there.

TABLE = {
    "path": ["a.mp4", "sub/b.mp4", "bad.mp4"],
    "text": ["a cat,\nsitting\u2028", None, ""],
    "num_frames": [12, None, 0],
    "height": [32.0, 48.0, 0.0],
    "width": [64.0, 96.0, 0.0],
    "fps": [8.0, float("nan"), float("nan")],
    "aesthetic": [5.1, 4.2, 0.0],
}
ROWS = [
    ("a.mp4", "a cat,\nsitting", 12, 32, 64, 8),
    ("sub/b.mp4", "", None, 48, 96, None),
    ("bad.mp4", "", *(None,) * 4),
]


def facts(rows):
    return [(row.name, row.caption, row.num_frames, row.height, row.width, row.fps) for row in rows]


def test_a_parquet_file_is_read_like_a_csv(tmp_path, caplog):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "set.parquet"
    parquet.write_table(pyarrow.table(TABLE), path)
    rows = read_index(path)
    assert facts(rows) == ROWS and rows[1].path == tmp_path / "sub" / "b.mp4"
    assert "1 of 3 rows say that their files are empty: bad.mp4" in caplog.text
    for change, message in {
        "path": "no column 'video' or 'path'; its columns are text, num_frames, height, width, fps, aesthetic",
        "fps": "row 2: the column 'fps' is '-3.0'; it must be a number above 0, or empty",
    }.items():
        table = {name: values for name, values in TABLE.items() if name != change}
        if change == "fps":
            table["fps"] = [1.0, -3.0, 1.0]
        parquet.write_table(pyarrow.table(table), path)
        with pytest.raises(DataError, match=f"set.parquet.*{message}"):
            read_index(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="set.parquet: not a parquet file that can be read"):
        read_index(path)
    path.rename(tmp_path / "set.csv")
    with pytest.raises(DataError, match=r"set.csv: this is a parquet file; give it the suffix .parquet"):
        read_index(tmp_path / "set.csv")


class Frame:
    """What is used of a pandas.DataFrame."""

    columns = list(TABLE)

    def __getitem__(self, name):
        return SimpleNamespace(tolist=lambda: TABLE[name])


def test_without_pyarrow_pandas_reads_parquet_and_without_both_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "set.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(read_parquet=lambda _: Frame()))
    assert facts(read_index(path)) == ROWS
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DataError, match="set.parquet: a parquet file needs pyarrow or pandas .*: pip install pyarrow"):
        read_index(path)


def test_missing_index_and_folder_are_named(tmp_path):
    with pytest.raises(DataError, match="is a folder; give a CSV or a parquet file in it"):
        read_index(tmp_path)
    with pytest.raises(DataError, match="none.csv: no such"):
        read_index(tmp_path / "none.csv")
    with pytest.raises(DataError, match="nowhere: no such"):
        index(tmp_path, "video\na.mp4\n", video_folder=tmp_path / "nowhere")
