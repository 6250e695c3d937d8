"""The tree is the architecture: links, guards, what an import brings in, and tests that mirror the source."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = {
    "calibrate": "../calibrate",
    "simulate": "../simulate",
    "plan": "../plan",
    "execute": "../execute",
    "models": "../experiments/models",
}
# Where the tests of each folder of the source stand: named as it is imported.
MIRRORS = {
    "calibrate": "calibrate",
    "simulate": "simulate",
    "plan": "plan",
    "execute": "execute",
    "experiments/models": "models",
    "experiments": "experiments",
    "meshwright/cli": "cli",
}


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in the root of the checkout, where the bare folders can be found."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_leads_from_the_package_to_its_folder_on_any_machine(name: str) -> None:
    link = ROOT / "meshwright" / name
    assert link.is_symlink(), f"{link} is not a link; was the checkout made without symbolic links?"
    assert os.readlink(link) == LINKS[name]
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("name", ["calibrate", "simulate", "plan", "execute", "experiments.models"])
def test_the_bare_name_is_refused_with_the_right_one(name: str) -> None:
    ended = python(f"import {name}")
    assert ended.returncode != 0
    right = f"meshwright.{name.rpartition('.')[2]}"
    assert ended.stderr.splitlines()[-1].startswith(f"ImportError: import this package as {right}")


def modules_without_jax() -> Iterator[str]:
    """What must be importable on a machine with no accelerator in no time."""
    yield from ("meshwright", "meshwright.errors", "meshwright.cli.main", "meshwright.calibrate.hardware")
    for path in sorted((ROOT / "simulate").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield f"meshwright.{name}"
    if (ROOT / "plan" / "search.py").exists():
        yield "meshwright.plan.search"


def test_planning_and_simulating_bring_in_neither_jax_nor_mpi() -> None:
    """One interpreter imports them one after another, so the first that errs is named."""
    ended = python(
        "import importlib, sys\n"
        f"for name in {list(modules_without_jax())}:\n"
        "    importlib.import_module(name)\n"
        "    brought = {'jax', 'jaxlib', 'mpi4py'} & set(sys.modules)\n"
        "    if brought:\n"
        "        sys.exit(f'{name} brings in {sorted(brought)}')\n"
    )
    assert ended.returncode == 0, ended.stderr


def has_subject(test: Path, source: Path, package: str) -> bool:
    """Whether a test is named after a module of the folder it mirrors (more words may follow) or imports from it."""
    if not source.is_dir():
        return False
    subject = test.stem.removeprefix("test_") + "_"
    rooms = {path.stem for path in source.iterdir() if path.suffix == ".py" or path.is_dir()}
    return any(subject.startswith(f"{room}_") for room in rooms) or f"\nfrom {package}." in test.read_text()


def test_every_test_stands_where_its_source_does() -> None:
    """``tests/plan/test_graph.py`` tests ``plan/graph.py``."""
    strays = []
    for source, mirror in MIRRORS.items():
        package = "experiments" if mirror == "experiments" else f"meshwright.{mirror}"
        for test in (ROOT / "tests" / mirror).rglob("test_*.py"):
            inside = test.parent.relative_to(ROOT / "tests" / mirror)
            if not has_subject(test, ROOT / source / inside, ".".join((package, *inside.parts))):
                strays.append(str(test.relative_to(ROOT)))
    assert not strays, f"no source stands in the same place as {', '.join(sorted(strays))}"


def test_every_folder_of_tests_mirrors_one_of_the_source() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    strays = folders - set(MIRRORS.values())
    assert not strays, f"no source is mirrored by tests/{', tests/'.join(sorted(strays))}"
