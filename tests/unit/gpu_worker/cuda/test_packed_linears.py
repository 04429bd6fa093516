"""Quantized linears by the kernels against the same linears dequantized, and a real checkpoint through them."""

from __future__ import annotations

import pytest
import torch
from stepwire_kernels.packed_choice import DENSE_FROM_TOKENS
from structlog.testing import capture_logs

from gpu_worker.cuda.packed_linears import PackedLinears
from gpu_worker.layers.ops import TORCH_OPS
from gpu_worker.quant.activations import ActivationQuant, StaticScale
from gpu_worker.quant.on_load import quantize_by_output
from gpu_worker.quant.products import DenseProduct
from gpu_worker.quant.weights import QuantizedWeight, ScaledWeight
from tests.unit.gpu_worker.quant.packed_cases import affine, float4, random_blocks
from tests.unit.gpu_worker.quant.paged_model import QuantizedModel, fixture
from tests.unit.gpu_worker.quant.test_real_checkpoints import prompts

CPU = torch.device("cpu")


def eight_bit(kind: torch.dtype, block: tuple[int, int] | None = None) -> ScaledWeight:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(3)) * 0.1
    if block is None:
        return quantize_by_output(weight, kind)
    scales = torch.rand(-(-48 // block[0]), 256 // block[1]) * 0.01 + 0.001
    return ScaledWeight((weight * 1000).clamp(-127, 127).to(kind), scales, *block)


TOKEN8, TOKENI8 = ActivationQuant("float8", "token"), ActivationQuant("int8", "token")
GROUP8 = ActivationQuant("float8", "group", group_size=128)
SHUFFLED = (torch.arange(192) // 64)[torch.randperm(192, generator=torch.Generator().manual_seed(2))]
CASES: dict[str, tuple[QuantizedWeight, ActivationQuant | None, StaticScale | None]] = {
    "int4": (affine(24, 256, 64, 4), None, None),
    "act-order": (affine(24, 192, 64, 4, groups=SHUFFLED), None, None),
    "act-order-share": (affine(24, 100, 64, 4, groups=SHUFFLED[:100]), None, None),
    "nvfp4": (float4(24, 128, 16), None, None),
    "gguf": (random_blocks("Q6_K", 24, 256), None, None),
    "int8-weights-only": (eight_bit(torch.int8), None, None),
    "fp8-token": (eight_bit(torch.float8_e4m3fn), TOKEN8, None),
    "fp8-block": (eight_bit(torch.float8_e4m3fn, (16, 128)), GROUP8, None),
    "fp8-block-token": (eight_bit(torch.float8_e4m3fn, (16, 128)), TOKEN8, None),
    "fp8-channel-group": (eight_bit(torch.float8_e4m3fn), GROUP8, None),
    "fp8-static": (
        eight_bit(torch.float8_e4m3fn),
        ActivationQuant("float8", "tensor", dynamic=False),
        StaticScale(torch.tensor(0.01)),
    ),
    "int8-token": (eight_bit(torch.int8), TOKENI8, None),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_tokens", [2, 40])
def test_the_kernel_gives_what_the_dequantized_weights_give(name: str, num_tokens: int) -> None:
    weight, activations, static = CASES[name]
    x = torch.randn(num_tokens, weight.num_inputs, generator=torch.Generator().manual_seed(9))
    bias = torch.randn(weight.num_outputs)
    product = PackedLinears(CPU, pdl=False).product(weight, activations, static, torch.float32)
    assert product is not None
    expected = DenseProduct(weight, activations, static, torch.float32, TORCH_OPS).apply(x, bias)
    torch.testing.assert_close(product.apply(x, bias), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    dense_bytes = weight.num_outputs * weight.num_inputs * 2
    if name != "act-order-share":  # a share so small is mostly filling
        assert product.num_bytes() < 0.75 * dense_bytes + 8 * weight.num_inputs


@pytest.mark.parametrize(
    ("weight", "activations", "static"),
    [
        (affine(8, 96, 48, 4), None, None),
        (affine(8, 64, 64, 4), TOKENI8, None),
        (eight_bit(torch.float8_e4m3fn), None, None),
        (eight_bit(torch.int8), TOKEN8, None),
        (eight_bit(torch.int8), ActivationQuant("int8", "token", symmetric=False), None),
        (random_blocks("Q2_K", 8, 256), None, None),
    ],
    ids=["3-bit", "int8 inputs", "float8", "other inputs", "asymmetric inputs", "Q2_K"],
)
def test_what_has_no_kernel_is_left_to_be_dequantized(
    weight: QuantizedWeight, activations: ActivationQuant | None, static: StaticScale | None
) -> None:
    assert PackedLinears(CPU, pdl=False).product(weight, activations, static, torch.float32) is None


def test_without_float8_its_weights_are_left_to_plain_torch_with_one_warning() -> None:
    linears = PackedLinears(CPU, pdl=False, reads_float8=False)
    with capture_logs() as logs:
        for name, (weight, activations, static) in CASES.items():
            has_product = linears.product(weight, activations, static, torch.float32) is not None
            assert has_product == (not name.startswith("fp8") and name != "nvfp4"), name
    (warning,) = logs
    assert warning["log_level"] == "warning" and "plain torch" in warning["event"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "awq-g64",
        "gptq-g64-desc",
        "gptq-g32-asym-v2",
        "ct-w4a16-asym",
        "ct-fp8-dynamic",
        "fp8-block",
        "ct-w8a8-int8-sq",
    ],
)
def test_a_real_checkpoint_through_the_kernels(name: str) -> None:
    case = min(prompts(name), key=lambda one: len(one["prompt_ids"]))
    model = QuantizedModel(fixture(name), kernels=PackedLinears(CPU, pdl=False))
    logits = model.logits(case["prompt_ids"])[-1]
    assert logits.argmax().item() == case["generated_ids"][0]
    expected = dict(case["top5_logprobs"][0])[case["generated_ids"][0]]
    tolerance = 1e-3 if name in ("awq-g64", "gptq-g64-desc", "gptq-g32-asym-v2", "ct-w4a16-asym") else 0.1
    assert logits.log_softmax(-1).max().item() == pytest.approx(expected, abs=tolerance)


def test_the_largest_weight_sizes_the_scratch_of_all() -> None:
    linears = PackedLinears(CPU, pdl=False)
    assert linears.num_bytes() == 0
    for n, k in ((24, 256), (64, 512), (16, 128)):
        assert linears.product(affine(n, k, 64, 4), None, None, torch.bfloat16) is not None
    assert linears.num_bytes() == 64 * 512 * 2


def test_many_tokens_go_through_a_dense_copy_in_the_scratch() -> None:
    weight = affine(24, 256, 64, 4)
    linears = PackedLinears(CPU, pdl=False)
    product = linears.product(weight, None, None, torch.bfloat16)
    assert product is not None
    x = torch.randn(DENSE_FROM_TOKENS, 256, generator=torch.Generator().manual_seed(4)).bfloat16()
    dense = weight.dequantize().bfloat16()
    torch.testing.assert_close(product.apply(x, None), torch.nn.functional.linear(x, dense))
