"""The CSV index: what it may hold, and one clear line for what it may not."""

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
        ("num_frames", "0"),
        ("num_frames", "1.5"),
        ("height", "-2"),
        ("width", "inf"),
        ("fps", "-1"),
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
        ('video,caption\n"a.mp4,x\n', "not a CSV"),
    ],
)
def test_faulty_index_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as error:
        index(tmp_path, text)
    assert "set.csv" in str(error.value)


def test_other_encodings_are_refused(tmp_path):
    with pytest.raises(DataError, match="UTF-8"):
        index(tmp_path, "video\nbücher.mp4\n", "latin-1")


def test_missing_index_and_folder_are_named(tmp_path):
    with pytest.raises(DataError, match="none.csv: no such"):
        read_index(tmp_path / "none.csv")
    with pytest.raises(DataError, match="nowhere: no such"):
        index(tmp_path, "video\na.mp4\n", video_folder=tmp_path / "nowhere")
