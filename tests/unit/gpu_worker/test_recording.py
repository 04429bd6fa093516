"""The recording file: what is written is read back, whatever a crash leaves at its end."""

from __future__ import annotations

from pathlib import Path

import pytest
from stepwire.v1 import worker_pb2
from stepwire.v1.recording_pb2 import RecordingEntry, RecordingHeader

from gpu_worker.config import WorkerSettings
from gpu_worker.recording import FORMAT_VERSION, Recorder, RecordingError, read_recording, recorded_flags, write_entry


def step(step_id: int, num_bytes: int = 400) -> worker_pb2.StepBatch:
    return worker_pb2.StepBatch(step_id=step_id, run_rows=bytes(range(256)) * (num_bytes // 256 + 1))


def record(path: Path, num_steps: int, **options: int) -> None:
    recorder = Recorder(path, model="/models/m", flags=["--seed=1"], **options)
    recorder.begin(worker_pb2.DescribeResponse(model="m", num_blocks=7))
    recorder.hello(worker_pb2.SessionHello(session_id="s", protocol_version=1))
    for step_id in range(1, num_steps + 1):
        recorder.step(step(step_id))
        recorder.result(worker_pb2.StepResult(step_id=step_id))
    recorder.close()


def kinds(path: Path) -> list[str]:
    return [str(entry.WhichOneof("entry")) for entry in read_recording(path)]


def test_what_is_written_is_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "r"
    record(path, 3)
    entries = list(read_recording(path))
    assert kinds(path) == ["header", "hello"] + ["step", "result"] * 3
    header = entries[0].header
    assert (header.format_version, header.model, list(header.flags)) == (FORMAT_VERSION, "/models/m", ["--seed=1"])
    assert header.worker.num_blocks == 7
    assert entries[4].step == step(2)


def test_a_file_cut_anywhere_gives_its_whole_entries_and_goes_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "r"
    record(path, 2)
    whole = path.read_bytes()
    complete = kinds(path)
    first_size = len(whole)
    for entry in reversed(list(read_recording(path))):
        first_size = entry.ByteSize() + (1 if entry.ByteSize() < 128 else 2)
    for size in range(first_size, len(whole)):
        path.write_bytes(whole[:size])
        got = kinds(path)
        assert got == complete[: len(got)] and len(got) < len(complete)
    record(path, 1)
    assert kinds(path) == [*complete[:-1], "header", "hello", "step", "result"]


def test_a_slow_disk_ends_the_recording_with_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "r"
    record(path, 50, max_waiting_bytes=1200)
    got = kinds(path)
    assert got[:2] == ["header", "hello"]
    # Never with a gap: what is there are the first entries.
    ids = [entry.step.step_id for entry in read_recording(path) if entry.WhichOneof("entry") == "step"]
    assert ids == list(range(1, len(ids) + 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# stepwire\n\nnot a recording at all, but long enough to hold an entry of some size\n", "not a recording"),
        (b"\x05hello", "not a recording"),
        (b"\xff" * 40, "no entry is so long"),
    ],
)
def test_another_file_is_neither_read_nor_overwritten(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=message):
        list(read_recording(path))
    with pytest.raises(RecordingError, match=message):
        Recorder(path)
    assert path.read_bytes() == content


def test_bad_paths_and_versions_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"cannot write .*/missing/r: No such file"):
        Recorder(tmp_path / "missing" / "r")
    with pytest.raises(RecordingError, match="cannot read"):
        list(read_recording(tmp_path / "none"))
    (tmp_path / "empty").touch()
    with pytest.raises(RecordingError, match="is empty"):
        list(read_recording(tmp_path / "empty"))
    with (tmp_path / "next").open("wb") as file:
        write_entry(file, RecordingEntry(header=RecordingHeader(format_version=2)))
    with pytest.raises(RecordingError, match="format 2, this release reads 1"):
        list(read_recording(tmp_path / "next"))


def test_damage_in_the_middle_is_not_taken_for_an_end(tmp_path: Path) -> None:
    path = tmp_path / "r"
    record(path, 3)
    data = bytearray(path.read_bytes())
    sizes = [entry.ByteSize() for entry in read_recording(path)]
    # The first byte of the hello, after its length.
    data[1 + sizes[0] + 1] = 0xFF
    path.write_bytes(data)
    with pytest.raises(RecordingError, match="damaged at byte"):
        list(read_recording(path))


def test_a_header_keeps_the_settings_that_decide_results() -> None:
    settings = WorkerSettings(
        runner="simulated", listen="127.0.0.1:1", record=Path("r"), sim_crash_at_step=3, seed=4, sim_buckets=(8, 16)
    )
    flags = settings.replayable_flags()
    assert flags == ["--runner=simulated", "--seed=4", "--sim-buckets=8,16"]
    assert recorded_flags([*flags, "--enforce-eager"], ["--no-enforce-eager", "--seed", "5"]) == [
        "--runner=simulated",
        "--sim-buckets=8,16",
    ]
