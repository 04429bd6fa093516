"""Generate the protobuf stubs beside their .proto files: `make proto`. `--out DIR` writes elsewhere, to compare."""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path

from google.rpc import error_details_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` of every contract below `out`."""
    _run_protoc([f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"])


def write_descriptor(file: Path) -> None:
    """Write all contracts as one FileDescriptorSet, imports and comments included."""
    _run_protoc([f"--descriptor_set_out={file}", "--include_imports", "--include_source_info"])


def _run_protoc(outputs: list[str]) -> None:
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "stepwire").rglob("*.proto"))
    well_known = resources.files("grpc_tools") / "_proto"
    # google/rpc/*.proto are shipped by googleapis-common-protos, beside its stubs.
    google_rpc = Path(error_details_pb2.__file__).parents[2]
    arguments = ["protoc", f"-I{ROOT}", f"-I{well_known}", f"-I{google_rpc}"]
    if protoc.main([*arguments, *outputs, *sources]) != 0:
        sys.exit("protoc failed: see its message above")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT, help="source root to write below (default: beside the contracts)"
    )
    parser.add_argument(
        "--descriptor", type=Path, help="write the contracts as one FileDescriptorSet to this file instead"
    )
    given = parser.parse_args()
    if given.descriptor is not None:
        write_descriptor(given.descriptor)
    else:
        generate(given.out)
