from __future__ import annotations

from pathlib import Path

import pytest
from stepwire.process.model_names import name_of_directory

from control_plane.frontend.served_model import load_served_model
from gpu_worker.prepare.stamp import write_stamp


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "model.Q4_1-bfloat16-0123abcd"
    made.mkdir()
    (made / "config.json").write_text('{"eos_token_id": 5}')
    return made


@pytest.mark.parametrize(
    ("source", "name"), [("Tiny-1B.Q4_1.gguf", "Tiny-1B.Q4_1"), ("Tiny-1B/tokenizer.model", "Tiny-1B")]
)
def test_a_prepared_directory_has_the_name_of_its_source(
    directory: Path, tmp_path: Path, source: str, name: str
) -> None:
    file = tmp_path / "sources" / source
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    write_stamp(directory, [file], {"dtype": "bfloat16"}, ["config.json"], {file.name: "0"})
    assert name_of_directory(directory) == name
    assert load_served_model(directory).names == (name,)
    assert load_served_model(directory, names=["mine"]).names == ("mine",)


@pytest.mark.parametrize("stamp", [None, b"", b"[]", b'{"sources": []}', b'{"sources": [{"path": 3}]}'])
def test_any_other_directory_has_its_own(directory: Path, stamp: bytes | None) -> None:
    if stamp is not None:
        (directory / "stepwire_prepare.json").write_bytes(stamp)
    assert name_of_directory(directory) == "model.Q4_1-bfloat16-0123abcd"
