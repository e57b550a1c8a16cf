"""Every case of README.md has a test, and every numbered test a case."""

import re
from pathlib import Path


def test_every_case_has_a_test() -> None:
    folder = Path(__file__).parent
    listed = re.findall(r"^(\d+)\. ", (folder / "README.md").read_text(), re.MULTILINE)
    names = re.findall(r"^def test((?:_\d\d)+)_", "".join(p.read_text() for p in folder.glob("*.py")), re.MULTILINE)
    tested = {int(number) for name in names for number in name.strip("_").split("_")}
    assert [int(number) for number in listed] == sorted(tested - {0})  # 0: the reference itself
