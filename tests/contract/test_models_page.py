"""docs/models.md says what the registries say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gpu_worker.models.registry import known_architectures

PROGRAM = Path(__file__).resolve().parents[2] / "docs" / "models_page.py"


def test_the_page_is_what_its_program_writes() -> None:
    spec = importlib.util.spec_from_file_location("models_page", PROGRAM)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    written = program.PAGE.read_text(encoding="utf-8")
    assert program.page() == written, "docs/models.md is out of date: run `make docs`"
    assert all(f"`{name}`" in written for name in known_architectures())
