"""Which method each linear of a model gets, by what its checkpoint says of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from gpu_worker.layers.ops import TORCH_OPS, LayerOps
from gpu_worker.loading.checkpoint import open_checkpoint
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.stacked_experts import EXPERTS, is_in_plain_stack
from gpu_worker.loading.weight_files import GGUF_NAME, gguf_in
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.checkpoint_names import checkpoint_modules
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.quant.api import LinearMethod, QuantScheme
from gpu_worker.quant.auto_round import METHODS as AUTO_ROUND
from gpu_worker.quant.auto_round import read_auto_round
from gpu_worker.quant.bitsandbytes import METHOD as BITSANDBYTES
from gpu_worker.quant.bitsandbytes import read_bitsandbytes
from gpu_worker.quant.compressed_tensors import read_compressed_tensors
from gpu_worker.quant.config import (
    FIELD,
    SUPPORTED,
    ConfigSection,
    QuantConfig,
    read_awq,
    read_fbgemm_fp8,
    read_fp8,
    read_gptq,
    read_mxfp4,
)
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.gguf_format import GgufFormat
from gpu_worker.quant.hqq import METHOD as HQQ
from gpu_worker.quant.hqq import read_hqq
from gpu_worker.quant.mlx import METHOD as MLX
from gpu_worker.quant.mlx import read_mlx
from gpu_worker.quant.modelopt import read_modelopt
from gpu_worker.quant.none import Unquantized, UnquantizedLinear
from gpu_worker.quant.on_load import QuantizingLinear
from gpu_worker.quant.products import PackedKernels
from gpu_worker.quant.quark import METHOD as QUARK
from gpu_worker.quant.quark import read_quark
from gpu_worker.quant.stored import SplitLinear, StoredLinear
from gpu_worker.quant.torchao import METHOD as TORCHAO
from gpu_worker.quant.torchao import read_torchao

QuantizationSetting = Literal["auto", "fp8", "int8"]
ON_LOAD = ("fp8", "int8")
# Files beside config.json in which old tools, and ModelOpt, say how they quantized.
OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def read_quantization(config: HfConfig, stored_names: Collection[str] = ()) -> QuantConfig | None:
    """How a checkpoint is quantized, by its config.json (and by the names of its tensors, where they are known).

    Raises:
        ModelConfigError: a variant that is not supported, or a field that says nothing; the message has its name and
            the list of what works.
    """
    fields = quantization_fields(config)
    if not fields:
        return None
    if not isinstance(fields, dict):
        raise config.error(FIELD, f"is {fields!r:.60}, expected an object")
    method = _method(fields)
    section = ConfigSection(fields, config.error)
    match method:
        case "gptq":
            return read_gptq(section)
        case "awq":
            return read_awq(section)
        case "fp8" | "mxfp8":
            return read_fp8(section, stored_names)
        case "fbgemm_fp8":
            return read_fbgemm_fp8(section)
        case _ if method in AUTO_ROUND:
            return read_auto_round(section)
        case _ if method == BITSANDBYTES:
            return read_bitsandbytes(section)
        case "compressed-tensors":
            return read_compressed_tensors(section)
        case "mxfp4":
            return read_mxfp4(section)
        case "modelopt" | "modelopt_fp4" | "modelopt_mxfp8" | "modelopt_mixed":
            return read_modelopt(section)
        case _ if method == QUARK:
            return read_quark(section)
        case _ if method == MLX:
            return read_mlx(section)
        case _ if method == HQQ:
            return read_hqq(section)
        case _ if method == TORCHAO:
            return read_torchao(section)
        case "gguf":
            return QuantConfig("gguf", lambda name: None, "gguf")
        case _:
            raise config.error(FIELD, f"names quant_method {method!r}, which is not supported; supported: {SUPPORTED}")


def quantization_fields(config: HfConfig) -> Any:
    """`quantization_config`, wherever a checkpoint has it; None: nowhere.

    Multimodal models may have it in their text part, and files of 2023 in a file of its own.
    """
    found = config.quantization_fields()
    if found is not None:
        return found
    for name, method in OWN_FILES.items():
        file = Path(config.file).parent / name
        if Path(config.file).name == "config.json" and file.is_file():
            fields = HfConfig.read(file).fields
            return fields | {"quant_method": fields.get("quant_method") or method}
    return None


def _method(fields: dict[str, Any]) -> Any:
    """`quant_method`, or what the other fields say where it is missing: its first writers left it out."""
    if fields.get("quant_method") is not None:
        name = fields["quant_method"]
        return name.lower().replace("compressed_tensors", "compressed-tensors") if isinstance(name, str) else name
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        return BITSANDBYTES
    if "quant_algo" in fields or isinstance(fields.get("quantization"), dict):
        return "modelopt"
    if fields.get("config_groups"):
        return "compressed-tensors"
    if "zero_point" in fields or "version" in fields:
        return "awq"
    if "desc_act" in fields or "damp_percent" in fields:
        return "gptq"
    return MLX if {"bits", "group_size"} <= fields.keys() else None


def stored_names(directory: Path) -> frozenset[str]:
    """Names of the checkpoint's tensors; headers are read, no weights."""
    checkpoint = open_checkpoint(directory)
    try:
        return frozenset(info.name for info in checkpoint.names())
    finally:
        checkpoint.close()


def make_scheme(
    directory: Path,
    name_rules: Mapping[str, Mapping[str, str]],
    *,
    setting: QuantizationSetting = "auto",
    has_weights: bool = True,
    ops: LayerOps = TORCH_OPS,
    kernels: PackedKernels | None = None,
    canonical_name: Callable[[str], str] = str,
) -> QuantScheme:
    """The scheme for the model in `directory`.

    Args:
        name_rules: the model family's: layer path -> part -> place of its tensors in the checkpoint.
        setting: `fp8` or `int8` quantize a checkpoint that is not quantized while it is loaded.
        has_weights: False for random weights from config.json alone.
        kernels: what multiplies by packed weights; without them weights are dequantized.
        canonical_name: a checkpoint tensor's name as the rules have it.

    Raises:
        ModelConfigError: the checkpoint's variant is not supported, or `setting` contradicts it.
        CheckpointError: the checkpoint is damaged.
    """
    config = HfConfig.open(directory)
    names = stored_names(directory) if has_weights and quantization_fields(config) else frozenset()
    quant = read_quantization(config, names)
    if setting != "auto" and quant is not None and quant.method != setting:
        raise ModelConfigError(
            f"quantization is set to {setting}, and the checkpoint is quantized already: "
            f"{quant.label or quant.method}; leave --quantization out"
        )
    if quant is None:
        return Unquantized(ops) if setting == "auto" else OnLoadScheme(setting, ops, kernels)
    if quant.method == "gguf" and has_weights:
        return GgufScheme(gguf_in(directory) or directory / GGUF_NAME, name_rules, ops, kernels, canonical_name)
    return CheckpointScheme(quant, name_rules, names, ops, kernels, canonical_name)


class _ByName:
    """Finds a linear's modules in the checkpoint, and puts formats of its parts together."""

    fused_experts_are_packed = False

    def __init__(
        self, name_rules: Mapping[str, Mapping[str, str]], ops: LayerOps, kernels: PackedKernels | None
    ) -> None:
        self._name_rules, self._ops, self._kernels = name_rules, ops, kernels

    def format_of(self, name: str) -> WeightFormat | None:
        raise NotImplementedError

    def linear_method(self, path: str) -> LinearMethod:
        formats = {part: self.format_of(name) for part, name in modules_of(self._name_rules, path).items()}
        kinds = list(formats.values())
        if not kinds or all(kind == kinds[0] for kind in kinds):
            return self._method(kinds[0] if kinds else None)
        return SplitLinear({part: self._method(kind) for part, kind in formats.items()})

    def _method(self, kind: WeightFormat | None) -> LinearMethod:
        return UnquantizedLinear(self._ops) if kind is None else StoredLinear(kind, self._ops, self._kernels)


class CheckpointScheme(_ByName):
    """Linears as `quantization_config` describes them, each by its unfused name in the checkpoint."""

    def __init__(
        self,
        quant: QuantConfig,
        name_rules: Mapping[str, Mapping[str, str]],
        names: Collection[str],
        ops: LayerOps = TORCH_OPS,
        kernels: PackedKernels | None = None,
        canonical_name: Callable[[str], str] = str,
    ) -> None:
        super().__init__(name_rules, ops, kernels)
        canonical = {canonical_name(name): name for name in names}
        self._quant, self._names = quant, frozenset(names) | canonical.keys()
        self._modules = StoredModules(canonical)
        self.fused_experts_are_packed = quant.method == "mxfp4" and (
            not names or any(name.endswith("_blocks") for name in names)
        )

    def format_of(self, name: str) -> WeightFormat | None:
        return module_format(self._quant, name, self._modules.name_of(name), self._names)


class GgufScheme(_ByName):
    """Linears as a GGUF file stores each of them."""

    def __init__(
        self,
        file: Path,
        name_rules: Mapping[str, Mapping[str, str]],
        ops: LayerOps = TORCH_OPS,
        kernels: PackedKernels | None = None,
        canonical_name: Callable[[str], str] = str,
    ) -> None:
        super().__init__(name_rules, ops, kernels)
        with GgufReader(file) as reader:
            self._types = {canonical_name(info.name): reader.stored_type(info.name) for info in reader.names()}

    def format_of(self, name: str) -> WeightFormat | None:
        kind = self._types.get(f"{name}.weight")
        return None if kind is None or not kind.is_packed else GgufFormat(kind.name)


class OnLoadScheme:
    """Quantizes plain weights while they are loaded."""

    fused_experts_are_packed = False

    def __init__(self, kind: Literal["fp8", "int8"], ops: LayerOps, kernels: PackedKernels | None) -> None:
        self._kind, self._ops, self._kernels = kind, ops, kernels

    def linear_method(self, path: str) -> LinearMethod:
        return QuantizingLinear(self._kind, self._ops, self._kernels)


class StoredModules:
    """Names of modules in the checkpoint.

    Args:
        stored_names: a tensor's canonical name -> its name in the checkpoint.
    """

    def __init__(self, stored_names: Mapping[str, str]) -> None:
        self._names = {name.rpartition(".")[0]: stored.rpartition(".")[0] for name, stored in stored_names.items()}

    def name_of(self, module: str) -> str:
        """For a canonical name; one expert of those that are stored in one tensor is named as if it stood alone."""
        experts, marker, member = module.partition(EXPERTS)
        stack = self._names.get(experts + EXPERTS.rstrip(".")) if marker else None
        return self._names.get(module, module if stack is None else f"{stack}.{member}")


def module_format(
    quant: QuantConfig, name: str, stored_name: str, tensor_names: Collection[str]
) -> WeightFormat | None:
    """How one module is stored; None: plainly.

    The config speaks of it under the checkpoint's name, or under the one that a library had for it in memory. Where
    the tensors say otherwise they win: routers are no linears any more in new libraries, which then do not list them
    as left out, and pieces of names (`gate`) fit more modules than were meant.

    Args:
        stored_name: of the module in the checkpoint.
        tensor_names: of all tensors, as the checkpoint and as the rules have them; empty: not known.
    """
    said = quant.format_of(stored_name) or quant.format_of(name)
    stored = said or quant.otherwise
    if not tensor_names or stored is None:
        return said
    if f"{stored_name}.{stored.marker}" in tensor_names:
        return stored
    is_plain = f"{stored_name}.weight" in tensor_names or any(
        is_in_plain_stack(known, tensor_names) for known in (stored_name, name)
    )
    return None if is_plain else said


def modules_of(name_rules: Mapping[str, Mapping[str, str]], path: str) -> dict[str, str]:
    """Part -> module name in the checkpoint, for a layer's path; empty for a layer that the rules do not name."""
    # "q+k+v" stands for parts that the checkpoint has in one module.
    return {part: name for parts, name in checkpoint_modules(name_rules, path).items() for part in parts.split("+")}
