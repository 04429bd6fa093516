"""`prepare` as people run it: sources, reuse, interruption, and what goes wrong."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from gpu_worker.loading.checkpoint import open_checkpoint
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.tensor_source import CheckpointError, iterate
from gpu_worker.prepare import gguf_model
from gpu_worker.prepare.__main__ import main
from gpu_worker.prepare.errors import PrepareError
from gpu_worker.prepare.preparation import prepare
from gpu_worker.prepare.progress import PlainProgress, SilentProgress, default_progress
from gpu_worker.prepare.stamp import STAMP_NAME
from tests.unit.gpu_worker.loading.synthetic_gguf import ARCHITECTURES, write_gguf

REPOSITORY_ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "Tiny-1M.Q8_0.gguf"
    write_gguf(path)
    return path


def _inode(directory: Path) -> int:
    return (directory / "model.safetensors").stat().st_ino


def _hidden(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if "partial" in path.name]


def test_a_gguf_model_in_several_files(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "whole.gguf")
    write_gguf(tmp_path / "model" / "Tiny-1M-Q8_0.gguf", split_max_tensors=8)
    (tmp_path / "model" / "mmproj-F16.gguf").write_bytes(b"GGUF")
    whole = prepare(tmp_path / "whole.gguf", tmp_path / "cache", dtype="float32", progress=SilentProgress())
    first = tmp_path / "model" / "Tiny-1M-Q8_0-00001-of-00003.gguf"
    # The directory stands for the one model in it.
    for source in (first, tmp_path / "model"):
        for dtype in ("float32", "packed"):
            model = prepare(source, tmp_path / "cache", dtype=dtype, progress=SilentProgress())
            assert model.name == "Tiny-1M" and model.reused == (source != first)
            with open_checkpoint(model.path) as prepared, open_checkpoint(whole.path) as expected:
                values = dict(iterate(expected))
                assert {name for name, _ in iterate(prepared)} == set(values)
                assert all(torch.equal(tensor, values[name]) for name, tensor in iterate(prepared))
    first.with_name("Tiny-1M-Q8_0-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf.*part \(2 of 3\)"):
        prepare(first, tmp_path / "other", progress=SilentProgress())
    write_gguf(tmp_path / "model" / "another.gguf")
    with pytest.raises(PrepareError, match=r"several models: .*Tiny-1M-Q8_0-00001-of-00003\.gguf, another\.gguf"):
        prepare(tmp_path / "model", tmp_path / "cache", progress=SilentProgress())


def test_a_projector_is_no_language_model(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="holds a projector for images or sound and no language model"):
        prepare(tmp_path / "mmproj.gguf", tmp_path / "cache", progress=SilentProgress())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_gguf_file_of_each_architecture(tmp_path: Path, architecture: str, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "m.gguf", architecture, tied=architecture.startswith("gemma"))
    model = prepare(tmp_path / "m.gguf", tmp_path / "cache", dtype=dtype, progress=SilentProgress())
    assert model.has_tokenizer
    assert Tokenizer.from_file(str(model.path / "tokenizer.json")).encode("the abc").tokens == ["the", "Ġ", "abc"]
    with GgufReader(tmp_path / "m.gguf") as reader, open_checkpoint(model.path) as prepared:
        assert {info.name for info in prepared.names()} == {info.name for info in reader.names()}
        for name, tensor in iterate(prepared):
            assert torch.equal(tensor, reader.read(name).to(getattr(torch, dtype))), name
    loaded, report = AutoModelForCausalLM.from_pretrained(model.path, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_second_time_is_not_done_again(source: Path, tmp_path: Path) -> None:
    first = prepare(source, tmp_path / "cache", progress=SilentProgress())
    assert (first.reused, first.name) == (False, "Tiny-1M")
    inode = _inode(first.path)
    second = prepare(source, tmp_path / "cache", progress=SilentProgress())
    assert second.path == first.path
    assert second.reused
    assert _inode(second.path) == inode


def test_a_source_with_another_time_and_the_same_content_is_known_by_its_hash(source: Path, tmp_path: Path) -> None:
    first = prepare(source, tmp_path / "cache", progress=SilentProgress())
    os.utime(source, (1, 1))
    assert prepare(source, tmp_path / "cache", progress=SilentProgress()).reused
    stamp = json.loads((first.path / STAMP_NAME).read_text())
    assert stamp["sources"][0]["mtime_ns"] == source.stat().st_mtime_ns


def test_another_content_another_dtype_and_a_lost_file_are_prepared_anew(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(source, out=out, progress=SilentProgress())
    write_gguf(source, seed=1)
    assert not prepare(source, out=out, progress=SilentProgress()).reused
    assert not prepare(source, out=out, dtype="float32", progress=SilentProgress()).reused
    (out / "tokenizer.json").unlink()
    assert not prepare(source, out=out, dtype="float32", progress=SilentProgress()).reused
    with (out / "model.safetensors").open("r+b") as stream:
        stream.truncate(100)
    assert not prepare(source, out=out, dtype="float32", progress=SilentProgress()).reused
    (out / STAMP_NAME).write_text("[]")
    assert not prepare(source, out=out, dtype="float32", progress=SilentProgress()).reused
    with open_checkpoint(out) as prepared, GgufReader(source) as reader:
        assert torch.equal(prepared.read("model.norm.weight"), reader.read("model.norm.weight"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", source.name, "out"]


def test_files_of_one_name_from_different_places_do_not_replace_each_other(tmp_path: Path) -> None:
    for number, directory in enumerate(("a", "b")):
        (tmp_path / directory).mkdir()
        write_gguf(tmp_path / directory / "m.gguf", seed=number)
    paths = [prepare(tmp_path / d / "m.gguf", tmp_path / "cache", progress=SilentProgress()).path for d in ("a", "b")]
    assert paths[0] != paths[1]
    assert prepare(tmp_path / "a" / "m.gguf", tmp_path / "cache", progress=SilentProgress()).reused


def test_shards(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "plan_shards", lambda infos: original(infos, 40_000))
    monkeypatch.setattr(gguf_model, "PIECE_ELEMENTS", 100)
    model = prepare(source, tmp_path / "cache", progress=SilentProgress())
    assert len(list(model.path.glob("model-*-of-*.safetensors"))) > 1
    with GgufReader(source) as reader, open_checkpoint(model.path) as prepared:
        for name, tensor in iterate(prepared):
            assert torch.equal(tensor, reader.read(name).to(torch.bfloat16)), name


original = gguf_model.plan_shards


def test_a_failure_in_the_middle_leaves_nothing_and_keeps_what_was_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prepare(source, out=out, progress=SilentProgress())
    inode = _inode(out)
    write_gguf(source, seed=2)

    def cut_short(self: GgufReader, name: str, index: object = None) -> torch.Tensor:
        if name == "model.norm.weight":
            raise CheckpointError(source, "cut short", tensor=name)
        return read(self, name, index)  # type: ignore[arg-type]

    read = GgufReader.read
    monkeypatch.setattr(GgufReader, "read", cut_short)
    with pytest.raises(CheckpointError, match="cut short"):
        prepare(source, out=out, progress=SilentProgress())
    assert _inode(out) == inode
    assert _hidden(tmp_path) == []


def test_a_killed_run_leaves_no_model_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    source = tmp_path / "big.gguf"
    write_gguf(source, layers=2, extra_tensors={"blk.0.ffn_up.weight": np.ones((96, 64), np.float32)})
    out = tmp_path / "out"
    # stops in the middle of the weights, and waits to be killed
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from gpu_worker.prepare import gguf_model\n"
        "from gpu_worker.prepare.preparation import prepare\n"
        "def stuck(self, info):\n"
        "    print('writing', flush=True); time.sleep(100)\n"
        "gguf_model._Conversion._pieces = stuck\n"
        "prepare(sys.argv[1], out=Path(sys.argv[2]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONPATH": str(REPOSITORY_ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert len(_hidden(tmp_path)) == 1
    assert not prepare(source, out=out, progress=SilentProgress()).reused
    assert _hidden(tmp_path) == []


def test_two_at_once_make_it_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    pieces = gguf_model._Conversion.fill

    def slow_fill(self: gguf_model._Conversion, directory: Path) -> None:
        runs.append(directory)
        time.sleep(0.2)
        pieces(self, directory)

    monkeypatch.setattr(gguf_model._Conversion, "fill", slow_fill)
    results: list[bool] = []

    def run() -> None:
        results.append(prepare(source, tmp_path / "cache", progress=SilentProgress()).reused)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, True]
    assert len(runs) == 1


def test_a_directory_is_used_in_place(source: Path, tmp_path: Path) -> None:
    made = prepare(source, tmp_path / "cache", progress=SilentProgress())
    stream = io.StringIO()
    again = prepare(made.path, tmp_path / "cache", out=tmp_path / "else", progress=PlainProgress(stream))
    assert (again.path, again.reused, again.has_tokenizer) == (made.path, True, True)
    assert not (tmp_path / "else").exists()
    assert "is used in place" in stream.getvalue()


def _error(source: str | Path, tmp_path: Path, **options: object) -> str:
    with pytest.raises((PrepareError, CheckpointError)) as caught:
        prepare(source, tmp_path / "cache", progress=SilentProgress(), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    assert "'./nowhere' does not exist: give a model directory, a .gguf file" in _error("./nowhere", tmp_path)
    assert "does not exist" in _error(tmp_path / "x.gguf", tmp_path)
    assert "does not exist" in _error("a/b/c", tmp_path)
    assert "'no-such-package-here' is not installed: pip install" in _error("pypi:no-such-package-here", tmp_path)
    (tmp_path / "notes.txt").touch()
    assert "is no .gguf file" in _error(tmp_path / "notes.txt", tmp_path)
    assert "dtype 'float8' is not known: use one of bfloat16, float32" in _error("x", tmp_path, dtype="float8")


def test_a_damaged_gguf_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    source.write_bytes(source.read_bytes()[:-5000])
    assert "the file is truncated" in _error(source, tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert _hidden(tmp_path) == []


def test_directories_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "name another directory with --cache-dir" in _error(source, tmp_path, out=tmp_path / "file" / "out")
    message = _error(source, tmp_path, out=Path("/proc/stepwire/out"))
    assert message.startswith("/proc/stepwire")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "exists and was not made by prepare" in _error(source, tmp_path, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert not prepare(source, out=tmp_path / "empty", progress=SilentProgress()).reused


def test_too_little_room_is_found_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = gguf_model.shutil._ntuple_diskusage(10**9, 10**9 - 5_000_000, 5_000_000)  # type: ignore[attr-defined]
    monkeypatch.setattr(gguf_model.shutil, "disk_usage", lambda path: usage)
    message = _error(source, tmp_path, out=tmp_path / "out")
    assert "has 5 MB of free space, 100 MB are needed: make room" in message
    assert not (tmp_path / "out").exists()


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'out'}\n"
    assert "Converting Tiny-1M.Q8_0.gguf to float32" in output.err
    assert "100%" in output.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert main([str(tmp_path / "none.gguf"), "--out", str(tmp_path / "out")]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1


def test_a_terminal_gets_a_bar(source: Path, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    prepare(source, tmp_path / "cache", progress=default_progress(stream))
    assert "Converting Tiny-1M.Q8_0.gguf" in stream.getvalue()
    assert "━" in stream.getvalue()


def test_the_result_needs_neither_transformers_nor_gguf(source: Path, tmp_path: Path) -> None:
    """Preparing a GGUF file and reading the result import no more than a worker has."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from gpu_worker.prepare.preparation import prepare\n"
        "from gpu_worker.loading.checkpoint import open_checkpoint\n"
        "from gpu_worker.loading.tensor_source import iterate\n"
        "model = prepare(sys.argv[1], Path(sys.argv[2]))\n"
        "assert len(dict(iterate(open_checkpoint(model.path)))) == 21\n"
        "found = {'transformers', 'gguf', 'huggingface_hub', 'sentencepiece'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "cache")],
        env={"PYTHONPATH": str(REPOSITORY_ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def test_what_is_prepared_is_found_without_torch(source: Path, tmp_path: Path) -> None:
    """Every start of a server asks, and would wait for seconds of imports."""
    made = prepare(source, tmp_path / "cache", progress=SilentProgress())
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from gpu_worker.prepare.preparation import prepare\n"
        "for model in sys.argv[1:3]:\n"
        "    assert prepare(model, Path(sys.argv[3])).path == Path(sys.argv[2])\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(source), str(made.path), str(tmp_path / "cache")],
        env={"PYTHONPATH": str(REPOSITORY_ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


_MEASURE = """
import sys
from pathlib import Path
import torch
from gpu_worker.prepare import gguf_model
from gpu_worker.prepare.preparation import prepare
from gpu_worker.prepare.progress import SilentProgress
torch.set_num_threads(1)
gguf_model.PIECE_ELEMENTS = 1 << 20
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak begins at what is resident now
before = peak()
prepare(sys.argv[1], out=Path(sys.argv[2]), progress=SilentProgress())
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    num_layers, inner = 30, 12_000
    tensor = np.ones((inner, 64), np.float32)
    large = {f"blk.{i}.ffn_{name}.weight": tensor for i in range(num_layers) for name in ("up", "gate")}
    write_gguf(tmp_path / "m.gguf", layers=num_layers, keys={"feed_forward_length": inner}, extra_tensors=large)
    assert (tmp_path / "m.gguf").stat().st_size > 180_000_000
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "m.gguf"), str(tmp_path / "out")],
        env={"PYTHONPATH": str(REPOSITORY_ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 60 << 20


def test_pieces_join_into_the_whole_tensor_with_permuted_rows(source: Path, tmp_path: Path) -> None:
    """A piece may end in the middle of a head whose rows are permuted."""
    conversion = None
    with GgufReader(source) as reader:
        conversion = gguf_model._Conversion(reader, "float32", SilentProgress())
        gguf_model_pieces = gguf_model.PIECE_ELEMENTS
        try:
            gguf_model.PIECE_ELEMENTS = 64 * 7  # type: ignore[misc]
            for info in reader.names():
                joined = torch.cat(list(conversion._pieces(info)))
                assert torch.equal(joined, reader.read(info.name)), info.name
        finally:
            gguf_model.PIECE_ELEMENTS = gguf_model_pieces  # type: ignore[misc]


def test_a_bare_config_is_accepted_when_weights_are_not_required(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "llama"}')
    model = prepare(bare, tmp_path / "cache", weights_required=False, progress=SilentProgress())
    assert not model.has_tokenizer
    assert "holds no *.safetensors file" in _error(bare, tmp_path)
    save_file({"a": torch.ones(1)}, bare / "model.safetensors")
    stream = io.StringIO()
    assert not prepare(bare, tmp_path / "cache", progress=PlainProgress(stream)).has_tokenizer
    assert "the server will take and give token ids only" in stream.getvalue()
