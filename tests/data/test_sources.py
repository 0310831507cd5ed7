"""The forms of --data-path and the file list."""

import pathlib

import pytest

from megalith.common.errors import ConfigError, DataError
from megalith.data.sources import Source, parse_data_path, read_file_list


def test_forms(tmp_path):
    assert (
        parse_data_path([]) == []
        and parse_data_path(["a"]) == [Source("a")]
        and parse_data_path(["a", "b", "c"]) == [Source("a"), Source("b"), Source("c")]
    )
    assert parse_data_path(["a", "b"]) == [Source("a"), Source("b")]
    assert parse_data_path(["0.3", "a", "7", "b", "0", "c"]) == [Source("a", 0.3), Source("b", 7.0)]
    for name in ("y_text", "x.idx", "y.idx", "x.bin"):
        (tmp_path / name).touch()
    assert parse_data_path([str(tmp_path)]) == [Source(str(tmp_path / "x")), Source(str(tmp_path / "y"))]


def test_a_folder_does_not_hide_the_dataset_of_its_name(tmp_path):
    (tmp_path / "wiki").mkdir()
    wiki = str(tmp_path / "wiki")
    for suffix in (".bin", ".idx"):
        (tmp_path / f"wiki{suffix}").touch()
    assert parse_data_path([wiki]) == [Source(wiki)]
    (tmp_path / "wiki" / "a.idx").touch()
    with pytest.raises(DataError, match=r"may mean two things: .*wiki\.bin.*wiki/"):
        parse_data_path([wiki])
    assert parse_data_path([f"{wiki}/"]) == [Source(f"{wiki}/a")] and parse_data_path([f"{wiki}.bin"]) == [
        Source(f"{wiki}.bin")
    ]


@pytest.mark.parametrize(
    "paths, meaning",
    [
        (["0.3", "a", "b", "c"], "must have a weight before each prefix, or before none; found 'b' for a weight"),
        (["-1", "a", "2", "b"], "0 or more"),
        (["nan", "a"], "0 or more"),
    ]
    + [
        (["0", "a"], "at least one finite weight"),
        (["1e308", "a", "1e308", "b"], "must be finite and above 0"),
        (["inf", "a"], "0 or more"),
    ],
)
def test_nonsense_is_refused(paths, meaning):
    with pytest.raises(ConfigError, match=meaning):
        parse_data_path(paths)


def test_an_empty_directory_is_named(tmp_path):
    with pytest.raises(DataError, match=r"must name a directory with \.idx files"):
        parse_data_path([str(tmp_path)])


def test_file_list(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# comment\n0.25 wiki/w-0000_text_document wiki\n\n5e-1 /abs/b.bin books\n0 unused x\n")
    assert read_file_list(path) == [
        Source(str(tmp_path / "wiki/w-0000_text_document"), 0.25, "wiki"),
        Source("/abs/b", 0.5, "books"),
    ]
    path.write_text("0.5\tmy.bin.d/a b-0000 wiki\n0 c x\n0 d wiki\n")
    assert read_file_list(path) == [Source(str(tmp_path / "my.bin.d/a b-0000"), 0.5, "wiki")]
    assert [source.prefix for source in read_file_list(path, keep_unused=True)] == [
        str(tmp_path / "my.bin.d/a b-0000"),
        str(tmp_path / "c"),
    ]
    for text, meaning in (
        ("0.5 a\n", "line 1.*weight path corpus"),
        ("0.5 a b\nx a b\n", "line 2"),
        ("\n", "names no dataset"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=meaning):
            read_file_list(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_file_list(pathlib.Path("nowhere"))
