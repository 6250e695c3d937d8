"""``meshwright export`` as a user starts it."""

import ast
import json
from pathlib import Path

import pytest

from meshwright.cli.main import main

PLAN = ["plan", "gpt:layers=4,hidden=64,heads=4,seq=32,vocab=256", "--cluster", "p3.16xlarge:1", "--batch", "16"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    fixed = [word for fix in ("microbatches=4", "tensor=4", "pipeline=2", "data=1") for word in ("--fix", fix)]
    assert main([*PLAN, *fixed, "-o", str(path)]) == 0
    return path


def test_stdout_is_the_text_alone(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(plan), "--to", "megatron"]) == 0
    told = capsys.readouterr()
    assert all(line.startswith("--") for line in told.out.splitlines())
    assert "--tensor-model-parallel-size 4" in told.out
    assert all(line.startswith("cannot be said: ") for line in told.err.splitlines())


def test_a_file_of_jax(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "plan.py"
    assert main(["export", str(plan), "--to", "jax", "-o", str(file)]) == 0
    imported = {
        ((node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"collections", "typing", "jax", "numpy"}
    assert capsys.readouterr().out == f"wrote {file}\n"


def test_json_is_one_object(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(plan), "--to", "maxtext", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "ici_tensor_parallelism: 4\n" in told["text"]
    assert any("its pipeline is one SPMD program" in said for said in told["cannot"])


def test_a_plan_of_another_model_is_one_line(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    text = plan.read_text(encoding="utf-8")
    other.write_text(text.replace("gpt:layers=4,hidden=64", "gpt:layers=4,hidden=128"), encoding="utf-8")
    assert main(["export", str(other), "--to", "jax"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["export", str(plan), "--to", "torch"]) == 2
