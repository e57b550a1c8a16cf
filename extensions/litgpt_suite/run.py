"""Runs litgpt's own tests with litgpt_kv's classes in the place of litgpt's.

    python extensions/litgpt_suite/run.py FOLDER [--theirs] [pytest's arguments]

FOLDER is the `tests` folder of a litgpt checkout or of its source distribution (`pip download --no-binary :all:
--no-deps litgpt==0.5.13`); `--theirs` leaves litgpt's classes alone, to see what fails without us.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# what meets the model; a name that the folder does not have is left out
FILES = ["model", "rope", "yarn", "rmsnorm", "multihead_latent_attention", "deepseek_moe", "batch", "generate*"]
FILES += ["chat", "api", "lora", "merge_lora", "adapter*", "full", "pretrain", "trainer_support"]


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 2
    folder, rest = Path(arguments[0]), [a for a in arguments[1:] if a != "--theirs"]
    if "--theirs" in arguments:
        os.environ["LITGPT_SUITE"] = "theirs"
    found = sorted({str(path) for name in FILES for path in folder.rglob(f"test_{name}.py")})
    found += sorted(str(path) for path in (folder / "generate").glob("test_*.py"))
    if not found:
        print(f"There are no test files of litgpt in {folder}.", file=sys.stderr)
        return 2
    here = str(Path(__file__).parent)
    sys.path.insert(0, here)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))  # for -n
    return pytest.main(
        ["-p", "litgpt_conftest", "-c", os.devnull, "--rootdir", str(folder), "--import-mode=importlib", *found, *rest]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
