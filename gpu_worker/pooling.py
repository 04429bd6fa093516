"""From the hidden states of a sequence to one vector or score: which pooling a checkpoint asks for, and the pooling.

A directory that Sentence Transformers wrote says it in `modules.json` (https://sbert.net): a Pooling, then Dense and
Normalize modules. A classification head with one output makes a cross encoder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from gpu_worker.layers.decoder import HiddenStates
from gpu_worker.loading.safetensors_reader import SafetensorsReader
from gpu_worker.model_spec import ModelConfigError, ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig

Task = Literal["auto", "generate", "embed", "score"]
Method = Literal["last", "mean", "cls"]
METHODS: tuple[Method, ...] = ("last", "mean", "cls")
MODULES_FILE = "modules.json"

_METHOD_OF_FLAG: dict[str, Method] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_METHOD_OF_NAME: dict[str, Method] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_DENSE_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Identity": torch.nn.Identity(),
    "Tanh": torch.tanh,
    "ReLU": F.relu,
    "GELU": F.gelu,
}


@dataclass(frozen=True, slots=True)
class DenseModule:
    """A linear behind the pooling."""

    directory: Path
    num_inputs: int
    num_outputs: int
    has_bias: bool
    activation: str


@dataclass(frozen=True, slots=True)
class PoolingSpec:
    kind: Literal["embedding", "score"]
    method: Method
    dimensions: int
    normalize: bool = False
    dense: tuple[DenseModule, ...] = ()
    sigmoid: bool = False
    """Scores become 1 / (1 + exp(-score))."""
    whole_prompts: bool = False
    """A row runs in one step: its tokens look at one another."""


def read_pooling(
    directory: Path, spec: ModelSpec, family: type[ModelFamily], task: Task = "auto", method: str = "auto"
) -> PoolingSpec | None:
    """What the model in `directory` is served for; None: to generate.

    Raises:
        ModelConfigError: it cannot do what `task` asks, or its modules are of kinds that are not known.
    """
    modules = _read_modules(directory)
    if task == "auto":
        is_embedder = not spec.has_output_head or any(kind == "Pooling" for kind, _ in modules)
        task = "score" if spec.num_labels else "embed" if is_embedder else "generate"
    if task == "generate":
        if not spec.has_output_head:
            raise ModelConfigError(f"{directory} has no output head, so it cannot generate: set --task embed or score")
        return None
    if task == "score":
        return _score_spec(directory, spec, family)
    pooled = _PoolingReader(directory, spec, family, method).read(modules)
    if spec.num_labels:
        raise ModelConfigError(f"{directory} is a classifier ({spec.architecture}): set --task score")
    return pooled


def _score_spec(directory: Path, spec: ModelSpec, family: type[ModelFamily]) -> PoolingSpec:
    if spec.num_labels != 1:
        what = f"{spec.num_labels} labels" if spec.num_labels else "no classification head"
        raise ModelConfigError(
            f"{directory} has {what}, and scores need a head with one; served for embeddings (--task embed), "
            "/v1/score gives cosines"
        )
    fields = HfConfig.open(directory).fields
    nested = fields.get("sentence_transformers")
    activation = (nested if isinstance(nested, dict) else {}).get("activation_fn") or fields.get(
        "sbert_ce_default_activation_function", "torch.nn.modules.activation.Sigmoid"
    )
    kind = str(activation).rpartition(".")[2]
    if kind not in ("Identity", "Sigmoid"):
        raise ModelConfigError(f"{directory}: activation_fn {activation!r} is not known: Identity and Sigmoid are")
    method: Method = "cls" if family.is_encoder else "last"
    return PoolingSpec("score", method, 1, sigmoid=kind == "Sigmoid", whole_prompts=family.is_encoder)


def _read_modules(directory: Path) -> list[tuple[str, str]]:
    """(kind, path) of each of Sentence Transformers' modules, the transformer itself left out."""
    file = directory / MODULES_FILE
    if not file.exists():
        return []
    content = _read_json(file)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ModelConfigError(f"{file}: holds no list of modules")
    modules = [(str(entry.get("type", "")).rpartition(".")[2], str(entry.get("path", ""))) for entry in content]
    return [(kind, path) for kind, path in modules if kind != "Transformer"]


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelConfigError(f"{file}: cannot be read ({error})") from error


class _PoolingReader:
    def __init__(self, directory: Path, spec: ModelSpec, family: type[ModelFamily], method: str) -> None:
        self._directory, self._spec, self._family, self._asked = directory, spec, family, method

    def read(self, modules: list[tuple[str, str]]) -> PoolingSpec:
        method: Method = "cls" if self._family.is_encoder else "last"
        normalize, dense, dimensions = not modules, [], self._spec.hidden_size
        for kind, path in modules:
            if kind == "Pooling":
                method = self._method(path)
            elif kind == "Dense":
                dense.append(self._dense(path, dimensions))
                dimensions = dense[-1].num_outputs
            elif kind == "Normalize":
                normalize = True
            else:
                raise ModelConfigError(
                    f"{self._directory / MODULES_FILE}: has a module of the kind {kind!r}; Transformer, Pooling, Dense "
                    "and Normalize are known"
                )
        if self._asked != "auto":
            method = next(known for known in METHODS if known == self._asked)
        return PoolingSpec(
            "embedding", method, dimensions, normalize, tuple(dense), whole_prompts=self._family.is_encoder
        )

    def _folder(self, path: str) -> Path:
        folder = (self._directory / path).resolve()
        if not folder.is_relative_to(self._directory.resolve()):
            raise ModelConfigError(f"{self._directory / MODULES_FILE}: path {path!r} leads out of the directory")
        return self._directory / path

    def _method(self, path: str) -> Method:
        file = self._folder(path) / "config.json"
        config = _read_json(file)
        name = config.get("pooling_mode")
        names = [name] if isinstance(name, str) else [flag for flag, on in config.items() if _is_mode(flag, on)]
        known = {**_METHOD_OF_FLAG, **_METHOD_OF_NAME}
        if len(names) != 1 or names[0] not in known:
            raise ModelConfigError(
                f"{file}: pools by {', '.join(names) or 'nothing'}; one of {', '.join(known)} is possible"
            )
        return known[names[0]]

    def _dense(self, path: str, num_inputs: int) -> DenseModule:
        folder = self._folder(path)
        config = _read_json(folder / "config.json")
        activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
        if activation not in _DENSE_ACTIVATIONS:
            raise ModelConfigError(
                f"{folder / 'config.json'}: activation_function {activation!r} is not known; known are "
                f"{', '.join(_DENSE_ACTIVATIONS)}"
            )
        if config.get("in_features") != num_inputs:
            raise ModelConfigError(
                f"{folder / 'config.json'}: in_features is {config.get('in_features')}, it gets {num_inputs}"
            )
        return DenseModule(folder, num_inputs, int(config["out_features"]), bool(config.get("bias", True)), activation)


def _is_mode(flag: str, on: object) -> bool:
    return flag.startswith("pooling_mode_") and on is True


@dataclass(frozen=True, slots=True)
class PooledRun:
    """Tokens of a pooling row in one step."""

    row: int
    first_token: int  # among the step's tokens
    num_tokens: int
    start_position: int
    is_last: bool


@dataclass(slots=True)
class _RowState:
    """What a row whose prompt comes in pieces has so far."""

    total: torch.Tensor  # float32 [hidden]
    num_tokens: int


class Pooler:
    """Pools the rows of one session; rows that are forgotten must be told of, or begin anew at position 0."""

    def __init__(self, spec: PoolingSpec, model: ModelFamily) -> None:
        self.spec = spec
        self._model = model
        self._states: dict[int, _RowState] = {}
        self._dense = [_load_dense(module, model.device) for module in spec.dense]

    @torch.inference_mode()
    def pool(self, runs: Sequence[PooledRun], hidden: HiddenStates) -> tuple[list[int], torch.Tensor | None]:
        """Rows that have run their last token, and their vectors float32 [num_rows, dimensions] on the device.

        hidden: of all the step's tokens. The states of rows that go on are kept.
        """
        spans = [self.tokens_of(run) for run in runs]
        states = self._states_of([token for span in spans for token in span], hidden)  # [num_needed, hidden]
        rows, vectors = [], []
        for run, part in zip(runs, states.split([len(span) for span in spans]), strict=True):
            vector = self.take(run, part)
            if vector is not None:
                rows.append(run.row)
                vectors.append(vector)
        return rows, self.finish(torch.stack(vectors)) if rows else None

    def _states_of(self, tokens: list[int], hidden: HiddenStates) -> torch.Tensor:
        if not tokens:
            return hidden.output[:0]
        on_host = torch.tensor(tokens, dtype=torch.int64)
        if hidden.output.is_cuda:
            on_host = on_host.pin_memory()
        return self._model.normed(hidden.select(on_host.to(hidden.output.device, non_blocking=True)))

    def tokens_of(self, run: PooledRun) -> range:
        """Which of the step's tokens this run's hidden states are needed of."""
        end = run.first_token + run.num_tokens
        if self.spec.method == "mean":
            return range(run.first_token, end)
        if self.spec.method == "cls":
            return range(run.first_token, run.first_token + (run.start_position == 0))
        return range(end - run.is_last, end)

    def take(self, run: PooledRun, states: torch.Tensor) -> torch.Tensor | None:
        """states: the last hidden states [len(tokens_of(run)), hidden]. The pooled state float32 [hidden], or None:
        more of the row is to come."""
        total = states.float().sum(0)
        before = None if run.start_position == 0 else self._states.pop(run.row, None)
        num_tokens = states.shape[0]
        if before is not None:
            total, num_tokens = total + before.total, num_tokens + before.num_tokens
        if run.is_last:
            self._states.pop(run.row, None)
            return total / num_tokens
        self._states[run.row] = _RowState(total, num_tokens)
        return None

    def finish(self, pooled: torch.Tensor) -> torch.Tensor:
        """pooled [num_rows, hidden] -> float32 [num_rows, dimensions]."""
        if self.spec.kind == "score":
            scores = self._model.scores(pooled).float()
            return scores.sigmoid() if self.spec.sigmoid else scores
        for (weight, bias), module in zip(self._dense, self.spec.dense, strict=True):
            pooled = _DENSE_ACTIVATIONS[module.activation](F.linear(pooled, weight, bias))
        if self.spec.normalize:
            pooled = F.normalize(pooled, dim=-1)
        return pooled

    def clear(self) -> None:
        self._states.clear()


def _load_dense(module: DenseModule, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    with SafetensorsReader(module.directory) as reader:
        shapes = {info.name: info.shape for info in reader.names()}
        expected: dict[str, tuple[int, ...]] = {"linear.weight": (module.num_outputs, module.num_inputs)}
        if module.has_bias:
            expected["linear.bias"] = (module.num_outputs,)
        if shapes != expected:
            raise ModelConfigError(f"{module.directory}: holds {shapes}, its config.json asks for {expected}")
        tensors = {name: reader.read(name).to(device, torch.float32).clone() for name in expected}
    return tensors["linear.weight"], tensors.get("linear.bias")
