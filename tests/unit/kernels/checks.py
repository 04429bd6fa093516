"""What the kernel tests share: poisoned outputs, tolerances, and repairs of Triton's interpreter."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from tests.unit.kernels.quick_interpreter import quicken_interpreter

# ||out - twin|| / ||twin|| that a kernel of this output dtype may show against its float64 twin.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.float8_e4m3fn: 5e-2,
}
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Where float16 takes the road of bfloat16 in everything but its bits.
USUAL_DTYPES = (torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow))


def poison(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A buffer full of NaN (or of the lowest integer), so that an element nobody wrote shows."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), device=device).to(dtype)
    return torch.full(shape, torch.iinfo(dtype).min, dtype=dtype, device=device)


def relative_error(out: torch.Tensor, twin: torch.Tensor) -> float:
    """||out - twin|| / ||twin|| in float64; NaN where anything is NaN."""
    out, twin = out.double().cpu(), twin.double().cpu()
    return float((out - twin).norm() / twin.norm().clamp(min=1e-300))


def assert_close(
    out: torch.Tensor, twin: torch.Tensor, *, factor: float = 1.0, dtype: torch.dtype | None = None
) -> None:
    """Relative error within the tolerance of the output's dtype (times factor); NaN never passes."""
    limit = TOLERANCE[dtype or out.dtype] * factor
    error = relative_error(out, twin)
    assert error <= limit, f"relative error {error:.3g} exceeds {limit:.3g}"


@cache
def repair_interpreter() -> None:
    """Once in a process. Make the interpreter round casts to nearest, multiply bfloat16 matrices, and run on NumPy 2.4.

    Its dot takes the bits of a bfloat16 or a float8 for an integer.

    NumPy 2.4 no longer turns one-element arrays into Python integers, which loops over a loaded bound need. Triton
    3.6's interpreter truncates float32 -> bfloat16, and its float8 cast loses the carry of a mantissa that rounds up
    (1.98 becomes 1.0). Casts go through torch instead, which rounds to nearest even.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    names = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2,
             "fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}  # fmt: skip

    def convert(data: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
        def carrier(kind: object) -> type:
            return getattr(np, f"int{kind.primitive_bitwidth}")

        def torch_bits(kind: object) -> torch.dtype:
            return getattr(torch, f"int{kind.primitive_bitwidth}")

        if str(source) not in names or str(target) not in names:
            raise NotImplementedError(f"interpreter cast {source} -> {target}")
        raw = np.frombuffer(data.tobytes(), dtype=carrier(source))
        values = torch.from_numpy(raw.copy()).view(names[str(source)])
        bits = values.to(names[str(target)]).view(torch_bits(target)).numpy()
        return bits.view(getattr(np, f"uint{target.primitive_bitwidth}")).reshape(data.shape)

    interpreter._convert_float = convert
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_index(tensor: type, scope: object) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_index
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def dot_in_float32(self: object, a: object, b: object, d: object, precision: object, imprecise: object) -> object:
        def widened(handle: object) -> object:
            if str(handle.dtype) not in ("bf16", "fp8e4nv"):
                return handle
            data = convert(handle.data, handle.dtype, tl.float32, None).view(np.float32)
            return interpreter.TensorHandle(data, tl.float32)

        return dot(self, widened(a), widened(b), d, precision, imprecise)

    builder.create_dot = dot_in_float32
    quicken_interpreter()
