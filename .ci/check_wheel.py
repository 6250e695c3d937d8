"""Does the wheel hold the whole package, what stands behind its links too, and nothing else?"""

import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".json", ".typed"}


def expected() -> set[str]:
    """The files of the package as named in a wheel: ``calibrate/fit.py`` is ``meshwright/calibrate/fit.py``."""
    package = ROOT / "meshwright"
    folders = [package, *(path for path in package.iterdir() if path.is_symlink())]
    return {
        (folder.relative_to(ROOT) / file.relative_to(folder.resolve())).as_posix()
        for folder in folders
        for file in folder.resolve().rglob("*")
        if file.suffix in SUFFIXES
    }


def main(wheel: str) -> int:
    """Name every difference; 0 if there is none."""
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = expected()
    for word, names in (("lacks", source - packed), ("should not hold", packed - source)):
        for name in sorted(names):
            print(f"the wheel {word} {name}")
    if packed == source:
        print(f"the wheel holds the {len(packed)} files of the package")
    return int(packed != source)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
