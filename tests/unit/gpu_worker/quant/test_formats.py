"""GPTQ, AWQ and FP8 tensors bit by bit as their layouts are published, and any share of a real weight."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from gpu_worker.models.hf_config import HfConfig
from gpu_worker.parallel.shares import ParallelError, Share
from gpu_worker.quant.affine_formats import GptqFormat
from gpu_worker.quant.float4_formats import Float4Format
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.gguf_format import GgufFormat
from gpu_worker.quant.scheme import read_quantization
from gpu_worker.quant.weights import ROW_STEP, ScaledWeight, dequantized
from tests.unit.gpu_worker.quant.paged_model import fixture

N, K = 16, 64
Rows = list[list[int]]


def pack(rows: Rows, bits: int) -> torch.Tensor:
    """Every row's integers as one long number, little end first, cut into words: int32 [len(rows), words]."""
    words = []
    for row in rows:
        number = sum(value << (bits * place) for place, value in enumerate(row))
        count = len(row) * bits // 32
        words.append([(number >> (32 * word)) & 0xFFFFFFFF for word in range(count)])
    return torch.tensor(words).to(torch.int32)


def integers(num_rows: int, num_columns: int, top: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, (num_rows, num_columns), generator=generator).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group_size", [32, -1])
def test_gptq_of_every_width_and_version(bits: int, version: int, group_size: int) -> None:
    group = K if group_size == -1 else group_size
    num_groups = K // group
    # A zero of 0 becomes a borrow from the neighbour in version 1, which adding to whole words undoes.
    codes, zeros = integers(N, K, 1 << bits, 1), integers(num_groups, N, 1 << bits, 2)
    zeros[0][0] = zeros[0][5] = 0
    stored_zeros = pack(zeros, bits)
    if version == 1:
        ones = pack([[1] * N] * num_groups, bits)
        stored_zeros = ((stored_zeros.long() - ones.long()) & 0xFFFFFFFF).to(torch.int32)
    scales = torch.rand(num_groups, N).half()
    tensors = {"qweight": pack(codes, bits).T.contiguous(), "qzeros": stored_zeros, "scales": scales}
    kind = GptqFormat(bits, group_size, zeros_minus_one=version == 1)
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) in kind.rules(N, K)[name].shapes
    got = kind.decode(tensors, Share(0, N, N), Share(0, K, K)).dequantize()
    for n in range(N):
        for k in range(K):
            g = k // group
            assert got[n, k].item() == (codes[n][k] - zeros[g][n]) * scales[g, n].item()


def test_gptq_of_three_bits_runs_over_word_boundaries() -> None:
    num_outputs = 32
    codes, zeros = integers(num_outputs, K, 8, 3), integers(2, num_outputs, 8, 4)
    scales = torch.rand(2, num_outputs).half()
    tensors = {"qweight": pack(codes, 3).T.contiguous(), "qzeros": pack(zeros, 3), "scales": scales}
    kind = GptqFormat(3, 32, zeros_minus_one=False)
    got = kind.decode(tensors, Share(0, num_outputs, num_outputs), Share(0, K, K)).dequantize()
    for n in range(num_outputs):
        for k in range(K):
            assert got[n, k].item() == (codes[n][k] - zeros[k // 32][n]) * scales[k // 32, n].item()


def format_of(name: str) -> WeightFormat:
    quant = read_quantization(HfConfig.open(fixture(name)))
    assert quant is not None
    found = quant.format_of("model.layers.0.mlp.down_proj")
    assert found is not None
    return found


@pytest.mark.parametrize(
    "name", ["awq-g64", "gptq-g64-desc", "gptq-g32-asym-v2", "ct-w4a16-asym", "fp8-block", "ct-fp8-dynamic"]
)
@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"])
def test_a_share_of_a_real_weight_is_that_part_of_it(name: str, module: str) -> None:
    kind = format_of(name)
    prefix = f"model.layers.0.{module}."
    tensors = {
        full.removeprefix(prefix): tensor
        for full, tensor in load_file(fixture(name) / "model.safetensors").items()
        if full.startswith(prefix)
    }
    n, k = kind.size_of({suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()})

    def share_of(rows: Share, cols: Share) -> torch.Tensor:
        cut = {
            suffix: tensor[kind.index(suffix, tuple(tensor.shape), rows, cols)] for suffix, tensor in tensors.items()
        }
        return kind.decode(cut, rows, cols).dequantize()

    whole = share_of(Share(0, n, n), Share(0, k, k))
    assert whole.std() > 0.01
    for size in (2, 3):
        for rank in range(size):
            rows = Share(rank * (n // size), n // size, n)
            cols = Share(rank * (k // size), k // size, k)
            # Column-parallel linears cut the rows, row-parallel ones the columns.
            assert torch.equal(share_of(rows, Share(0, k, k)), whole[rows.as_slice()])
            assert torch.equal(share_of(Share(0, n, n), cols), whole[:, cols.as_slice()])


@pytest.mark.parametrize("kind", [Float4Format("nvfp4"), Float4Format("mxfp4"), GgufFormat("Q4_K")])
def test_a_share_that_cuts_a_group_is_refused(kind: WeightFormat) -> None:
    name = next(iter(kind.rules(8, 512)))
    with pytest.raises(ParallelError, match="another --tensor-parallel-size"):
        kind.index(name, (8, 256), Share(0, 8, 8), Share(8, 248, 512))


@pytest.mark.parametrize("block", [(128, 128), (96, 80), (1, 200)])
def test_rows_of_blocks_of_any_size(block: tuple[int, int]) -> None:
    """Weights are unpacked some rows at a time, and a block of scales may lie across two lots of them."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-9, 9, (2 * ROW_STEP + 50, 200), generator=generator).to(torch.int8)
    sizes = [-(-size // one) for size, one in zip(values.shape, block, strict=True)]
    weight = ScaledWeight(values, torch.rand(sizes, generator=generator), *block)
    assert torch.equal(dequantized(weight, torch.float32), weight.dequantize())
