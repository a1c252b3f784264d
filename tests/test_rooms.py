"""The rooms: all of them stand in the linter's contract and in the picture, and each says which file to read first."""

import re
from importlib import import_module
from pathlib import Path

import testreg
from docs import pictures

ROOMS = {path.parent.name for path in Path(testreg.__file__).parent.glob("*/__init__.py")}
MOST = 300  # lines of a file


def test_every_room_has_its_floor():
    assert sorted(room for floor in pictures.floors() for room in floor) == sorted(ROOMS)


def test_the_picture_shows_the_rooms_as_they_are(tmp_path):
    pictures.rooms(tmp_path / "rooms.svg")
    shown = (pictures.DOCS / "rooms.svg").read_text()
    assert shown == (tmp_path / "rooms.svg").read_text(), "run `python -m docs.pictures`"
    assert set(re.findall(r">(\w+)/</text>", shown)) == ROOMS


def test_every_room_says_what_to_import_and_to_read():
    for room in ROOMS:
        module = import_module(f"testreg.{room}")
        assert re.search(r"May import|Imports nothing", module.__doc__), room
        first = re.search(r"Read `(\w+)`", module.__doc__)[1]
        assert (Path(module.__file__).parent / f"{first}.py").is_file(), room


def test_files_are_short_but_for_rows_of_data():
    long = {
        str(file.relative_to(Path(testreg.__file__).parent))
        for file in Path(testreg.__file__).parent.rglob("*.py")
        if len(file.read_text(encoding="utf-8").splitlines()) > MOST
    }
    assert long <= {"runtime/families.py"}
