"""Quantized mixtures over two ranks: what each rank's experts give adds up to what all experts on one rank give.

By width (a part of every expert) and by expert (some of them whole), with linears of their own as the CPU worker has
them and with the grouped kernels of the CUDA worker; and what cannot be split so is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from gpu_worker.cuda.ops import TritonOps
from gpu_worker.cuda.packed_linears import PackedLinears
from gpu_worker.layers.experts import ExpertLinears
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.moe import MixtureOfExperts
from gpu_worker.layers.ops import TORCH_OPS, LayerOps
from gpu_worker.layers.sublayer_input import SublayerInput
from gpu_worker.models.loader import load_weights, read_spec
from gpu_worker.parallel.shares import ParallelContext, ParallelError
from gpu_worker.prepare.preparation import prepare
from gpu_worker.prepare.progress import SilentProgress
from gpu_worker.quant.scheme import make_scheme
from tests.unit.gpu_worker.cuda.test_packed_mixtures import save_packed_gpt_oss, save_packed_qwen
from tests.unit.gpu_worker.cuda.test_scaled_mixtures import CONFIGS, save_eight_bit
from tests.unit.gpu_worker.loading.synthetic_gguf import EXPERTS, HIDDEN, write_gguf

CPU = torch.device("cpu")
# Whole groups of 32 inputs on each of two ranks.
INNER = 64
WAYS = ("width", "expert")
# Inputs of the second linear are quantized in each rank's part by itself: other roundings than on one rank.
DYNAMIC = ("fp8-block", "ct-fp8-channel", "ct-int8-channel", "load-fp8", "load-int8")
Where = Literal["linears", "kernels"]


def save(directory: Path, name: str, inner: int = INNER) -> Path:
    """The checkpoint that `name` says; where it is."""
    kind, _, rest = name.partition(":")
    if kind == "gguf":
        return save_gguf(directory, *rest.split(","), inner=inner)
    if kind in ("awq", "gptq"):
        save_packed_qwen(directory, kind, inner)
    elif kind == "mxfp4":
        save_packed_gpt_oss(directory, inner)
    else:
        save_eight_bit(directory, None if kind.startswith("load-") else kind, inner)
    return directory


def save_gguf(directory: Path, gate_up: str, down: str, inner: int) -> Path:
    from gguf import GGMLQuantizationType as Kind

    random = np.random.default_rng(5)
    shapes = {"gate": (EXPERTS, inner, HIDDEN), "up": (EXPERTS, inner, HIDDEN), "down": (EXPERTS, HIDDEN, inner)}
    experts = {f"blk.0.ffn_{n}_exps.weight": random.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
    kinds = {name: Kind[down if "down" in name else gate_up] for name in experts}
    write_gguf(directory / "m.gguf", "qwen3moe", layers=1, extra_tensors=experts, quantized=kinds)
    return prepare(directory / "m.gguf", directory / "cache", dtype="packed", progress=SilentProgress()).path


def mixture(directory: Path, name: str, parallel: ParallelContext, where: Where) -> MixtureOfExperts:
    """The first layer's experts of this rank."""
    spec, family = read_spec(directory)
    ops: LayerOps = TritonOps(CPU, pdl=False) if where == "kernels" else TORCH_OPS
    scheme = make_scheme(
        directory,
        family.name_rules,
        setting="fp8" if name == "load-fp8" else "int8" if name == "load-int8" else "auto",
        canonical_name=family.canonical_name,
        ops=ops,
        kernels=PackedLinears(CPU, pdl=False) if where == "kernels" else None,
    )
    model: Any = family(spec, 64, BuildContext(parallel, scheme, torch.float32, CPU, ops))
    load_weights(model, directory)
    found = model.blocks[0].mlp
    assert isinstance(found, MixtureOfExperts)
    return found


@torch.inference_mode()
def summand(directory: Path, name: str, parallel: ParallelContext, where: Where) -> torch.Tensor:
    """What this rank adds for seven tokens: [7, hidden]."""
    layer = mixture(directory, name, parallel, where)
    assert isinstance(layer.experts, ExpertLinears) == (where == "linears" and name != "mxfp4")
    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(3))
    return layer.experts.apply(x, layer.router.apply(SublayerInput.of(TORCH_OPS, x))).clone()


def ranks(way: str) -> list[ParallelContext]:
    return [ParallelContext(rank, 2, splits_experts_whole=way == "expert") for rank in range(2)]


def cases() -> list[Any]:
    names = ["awq", "gptq", "mxfp4", "gguf:Q8_0,Q4_0", "gguf:Q5_1,IQ4_NL", *CONFIGS, "load-fp8", "load-int8"]
    quick = {("awq", "width"), ("gguf:Q8_0,Q4_0", "width"), ("fp8-block", "width"), ("ct-int8-channel", "expert")}
    found = []
    for name in names:
        for way in WAYS:
            for where in ("linears", "kernels"):
                marks = () if (name, way) in quick and where == "linears" else pytest.mark.slow
                found.append(pytest.param(name, way, where, marks=marks))
    return found


@pytest.mark.parametrize(("name", "way", "where"), cases())
def test_ranks_add_up_to_one(tmp_path: Path, name: str, way: str, where: Where) -> None:
    directory = save(tmp_path, name)
    whole = summand(directory, name, ParallelContext(), where)
    parts = [summand(directory, name, rank, where) for rank in ranks(way)]
    assert all(part.abs().max() > 0 for part in parts)
    error = (sum(parts) - whole).abs().max() / whole.abs().max()
    assert error < (0.03 if name in DYNAMIC and way == "width" else 1e-4), error


@pytest.mark.parametrize(
    ("name", "where", "words"),
    [
        ("gguf:Q8_0,Q4_0", "linears", "no whole Q4_0 blocks of 32"),
        pytest.param("mxfp4", "kernels", "mxfp4 groups of 32", marks=pytest.mark.slow),
        pytest.param("fp8-block", "kernels", "cuts blocks of scales", marks=pytest.mark.slow),
    ],
)
def test_parts_that_cut_a_group_are_refused(tmp_path: Path, name: str, where: Where, words: str) -> None:
    """32 inner columns are half a group for each of two ranks. 24 of 48 begin within a block of 32: that leaves eights,
    and the kernel reads in sixteens."""
    directory = save(tmp_path, name, inner=48 if name == "fp8-block" else 32)
    with pytest.raises(ParallelError, match=words) as refused:
        mixture(directory, name, ranks("width")[1], where)
    assert "--tensor-parallel-size" in str(refused.value) and "--enable-expert-parallel" in str(refused.value)
    mixture(directory, name, ranks("expert")[1], where)


def test_experts_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, "awq")
    three = ParallelContext(0, 3, splits_experts_whole=True)
    with pytest.raises(ParallelError, match=r"num_\w+ 4 does not divide by tensor_parallel_size 3|num_attention_heads"):
        mixture(directory, "awq", three, "linears")
