"""Small files: whole or not at all, and {} where there is nothing."""

import pytest

from nanochat_jax.files import read_json, write_text


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "new" / "a.json"
    for text in ('{"a": 1}', '{"a": "ü"}'):
        write_text(path, text)
    assert read_json(path) == {"a": "ü"} and [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.json", '{"a": 1}')
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", '{"a": "\ud83c"}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "3"])
def test_no_object_is_an_empty_one(tmp_path, text):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    assert read_json(tmp_path / "a.json") == {}
