"""Files: atomic writes, {} for anything but a JSON object, and a folder's lock."""

import pytest

from nanochat_jax.config import UserError
from nanochat_jax.files import atomic_write, exclusive, read_json, sha256, write_text


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "new" / "a.json"
    for text in ('{"a": 1}', '{"a": "ü"}'):
        write_text(path, text)
    assert read_json(path) == {"a": "ü"} and [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.json", '{"a": 1}')
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", '{"a": "\ud83c"}')
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a.json") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert read_json(tmp_path / "a.json") == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_held_by_one_until_its_block_ends(tmp_path):
    for _ in range(2):
        with (
            exclusive(tmp_path / "run", "taken"),
            pytest.raises(UserError, match="taken"),
            exclusive(tmp_path / "run", "taken"),
        ):
            pass


def test_hash_is_that_of_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "3"])
def test_no_object_is_an_empty_one(tmp_path, text):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    assert read_json(tmp_path / "a.json") == {}
