"""Integers in groups with a scale and a zero point: GPTQ, AWQ and compressed-tensors' `pack-quantized`.

All of them mean W[n, k] = (q[n, k] - z[n, g]) * s[n, g] and differ in what is packed along which dimension, and in what
is added to the stored integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from gpu_worker.errors import LoadError
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.api import OutputSpan, RandomValues
from gpu_worker.quant.bit_packing import Packing
from gpu_worker.quant.formats import FLOAT_SCALES, Rules, Shape, TensorRule, Tensors, WeightFormat, covering
from gpu_worker.quant.weights import AffineWeight, QuantizedWeight

WORDS = (torch.int32, torch.uint32)
INDICES = (torch.int32, torch.int64)

# Nibble i of an AWQ word holds column AWQ_ORDER[i] of its eight, chosen for the order in which CUDA unpacks half pairs.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def whole_groups(num_inputs: int, group_size: int) -> int:
    """Groups of a row; a last one may be short."""
    return -(-num_inputs // group_size)


def _checked(groups: torch.Tensor, name: str, scales: torch.Tensor) -> torch.Tensor:
    """int64 [K]: every input's group. Raises `LoadError` for groups that `scales` [N, G] does not have."""
    least, most = (int(bound) for bound in groups.aminmax())
    if least < 0 or most >= scales.shape[1]:
        raise LoadError(
            f"{name} holds numbers from {least} to {most}, and a weight has {scales.shape[1]} groups: the checkpoint "
            "is damaged, or of a variant that is not supported; download it again"
        )
    return groups.long()


def group_share(cols: Share, group_size: int) -> tuple[slice, torch.Tensor | None]:
    """The groups that a share of the inputs touches, and each input's own where they are not whole from the start."""
    groups = covering(cols, group_size)
    if cols.start % group_size == 0:
        return groups, None
    return groups, torch.arange(cols.start, cols.stop) // group_size - groups.start


class _AffineFormat(WeightFormat):
    bits: int
    group_size: int

    @property
    def marker(self) -> str:
        return "qweight"

    def effective_group(self, num_inputs: int) -> int:
        """-1 stands for one group."""
        return num_inputs if self.group_size == -1 else self.group_size

    def random(
        self, num_outputs: int, num_inputs: int, std: float, source: RandomValues, device: torch.device
    ) -> QuantizedWeight:
        values = torch.empty(num_outputs, num_inputs, device=device)
        source.fill(values, std=2.0 ** (self.bits - 1) / 3)
        middle = 1 << (self.bits - 1)
        codes = (values + middle).round_().clamp_(0, 2 * middle - 1).to(torch.uint8)
        group = self.effective_group(num_inputs)
        scales = torch.full((num_outputs, whole_groups(num_inputs, group)), 3 * std / middle, device=device)
        zeros = torch.full((1, 1), middle, dtype=torch.uint8, device=device)
        return AffineWeight(codes, zeros, scales, group, self.bits)


@dataclass(frozen=True, slots=True)
class GptqFormat(_AffineFormat):
    """`quant_method: gptq` (https://arxiv.org/abs/2210.17323), formats v1 (zeros stored minus one) and v2."""

    bits: int
    group_size: int
    zeros_minus_one: bool
    may_have_stray_bias: bool = True

    @property
    def _packing(self) -> Packing:
        return Packing(self.bits)

    def rules(self, num_outputs: int, num_inputs: int) -> Rules:
        groups = whole_groups(num_inputs, self.effective_group(num_inputs))
        return {
            "qweight": TensorRule(((self._packing.num_words(num_inputs), num_outputs),), WORDS),
            "qzeros": TensorRule(((groups, self._packing.num_words(num_outputs)),), WORDS),
            "scales": TensorRule(((groups, num_outputs),), FLOAT_SCALES),
            "g_idx": TensorRule(((num_inputs,),), INDICES, optional=True),
        }

    def size_of(self, shapes: dict[str, Shape]) -> tuple[int, int]:
        num_words, num_outputs = shapes["qweight"]
        return num_outputs, shapes["g_idx"][0] if "g_idx" in shapes else num_words * 32 // self.bits

    def index(self, tensor: str, shape: Shape, rows: Share, cols: Share) -> tuple[slice, ...]:
        # With act-order any group can occur in any share of the inputs: every rank keeps all groups.
        match tensor:
            case "qweight":
                return (self._packing.words(cols), rows.as_slice())
            case "qzeros":
                return (slice(None), self._packing.words(rows))
            case "scales":
                return (slice(None), rows.as_slice())
            case _:
                return (cols.as_slice(),)

    def output_span(self, tensor: str) -> OutputSpan | None:
        if tensor == "g_idx":
            return None
        return OutputSpan(1, Fraction(self.bits, 32) if tensor == "qzeros" else Fraction(1))

    def decode(self, tensors: Tensors, rows: Share, cols: Share) -> QuantizedWeight:
        codes = self._packing.unpack(tensors["qweight"].view(torch.int32).t().contiguous(), cols)  # [N, K]
        zeros = self._zeros(tensors["qzeros"].view(torch.int32), rows).t().contiguous()  # [N, G]
        scales = tensors["scales"].float().t().contiguous()  # [N, G]
        group = self.effective_group(cols.total)
        by_position = torch.arange(cols.start, cols.stop, device=codes.device) // group  # [K]
        groups = _checked(tensors["g_idx"], "g_idx", scales).to(codes.device) if "g_idx" in tensors else by_position
        if torch.equal(groups, by_position) and cols.start % group == 0:
            # Act-order or not is what g_idx says, whatever the config does.
            touched = covering(cols, group)
            return AffineWeight(codes, zeros[:, touched], scales[:, touched], group, self.bits)
        return AffineWeight(codes, zeros, scales, group, self.bits, groups)

    def _zeros(self, words: torch.Tensor, rows: Share) -> torch.Tensor:
        """uint8 [G, rows.size]."""
        if not self.zeros_minus_one:
            return self._packing.unpack(words, rows)
        if 32 % self.bits:
            # Values that run on over words have 1 subtracted each by itself (auto-gptq 0.7.1, GPTQModel 7.7).
            return (self._packing.unpack(words, rows) + 1) & ((1 << self.bits) - 1)
        # The writer subtracts from whole words, with borrows from value to value; adding undoes just that.
        ones = sum(1 << shift for shift in range(0, 32, self.bits))
        return self._packing.unpack(words + torch.tensor(ones, device=words.device).to(torch.int32), rows)


@dataclass(frozen=True, slots=True)
class AwqFormat(_AffineFormat):
    """`quant_method: awq`, `version: gemm` (https://arxiv.org/abs/2306.00978; layout of AutoAWQ). Always 4 bits."""

    group_size: int
    has_zeros: bool = True
    bits: int = 4
    may_have_stray_bias: bool = False

    def rules(self, num_outputs: int, num_inputs: int) -> Rules:
        groups = whole_groups(num_inputs, self.effective_group(num_inputs))
        num_words = -(-num_outputs // 8)
        return {
            "qweight": TensorRule(((num_inputs, num_words),), WORDS),
            # Files without zero points may still carry the tensor: of 8s (GPTQModel), or empty.
            "qzeros": TensorRule(((groups, num_words),), WORDS, optional=not self.has_zeros),
            "scales": TensorRule(((groups, num_outputs),), FLOAT_SCALES),
        }

    def size_of(self, shapes: dict[str, Shape]) -> tuple[int, int]:
        return shapes["scales"][1], shapes["qweight"][0]

    def index(self, tensor: str, shape: Shape, rows: Share, cols: Share) -> tuple[slice, ...]:
        words = covering(rows, 8)
        groups = covering(cols, self.effective_group(cols.total))
        match tensor:
            case "qweight":
                return (cols.as_slice(), words)
            case "qzeros":
                return (groups, words)
            case _:
                return (groups, rows.as_slice())

    def output_span(self, tensor: str) -> OutputSpan | None:
        return OutputSpan(1, Fraction(1) if tensor == "scales" else Fraction(1, 8))

    def decode(self, tensors: Tensors, rows: Share, cols: Share) -> QuantizedWeight:
        group = self.effective_group(cols.total)
        codes = _unpack_awq(tensors["qweight"], rows).t().contiguous()  # [N, K]
        scales = tensors["scales"].float().t().contiguous()  # [N, G]
        if self.has_zeros or ("qzeros" in tensors and tensors["qzeros"].any()):
            zeros = _unpack_awq(tensors["qzeros"], rows).t().contiguous()  # [N, G]
        else:
            zeros = torch.full((1, 1), 8, dtype=torch.uint8, device=codes.device)
        _, groups = group_share(cols, group)
        return AffineWeight(codes, zeros, scales, group, 4, None if groups is None else groups.to(codes.device))


def _unpack_awq(words: torch.Tensor, rows: Share) -> torch.Tensor:
    """words [m, n] -> uint8 [m, rows.size]."""
    # Byte by byte: as words, every nibble would take four bytes on the way.
    stored = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))  # [m, n, 4], low byte first
    nibbles = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)  # [m, n, 8]
    by_column = torch.tensor([AWQ_ORDER.index(column) for column in range(8)], device=words.device)
    values = nibbles.index_select(-1, by_column).flatten(-2)
    first = rows.start % 8
    return values[:, first : first + rows.size]


@dataclass(frozen=True, slots=True)
class PackQuantizedFormat(_AffineFormat):
    """compressed-tensors `pack-quantized`: signed integers stored with 2^(bits-1) added, packed along the inputs."""

    bits: int
    group_size: int
    symmetric: bool
    may_have_group_index: bool = False
    may_have_stray_bias: bool = False

    @property
    def marker(self) -> str:
        return "weight_packed"

    def _packings(self) -> tuple[Packing, Packing]:
        """As written today, and as old releases wrote widths that do not divide 32."""
        return Packing(self.bits), Packing(self.bits, runs_on=False)

    def _packing_of(self, num_words: int, num_values: int) -> Packing:
        dense, padded = self._packings()
        return dense if dense.num_words(num_values) == num_words else padded

    def rules(self, num_outputs: int, num_inputs: int) -> Rules:
        groups = whole_groups(num_inputs, self.effective_group(num_inputs))
        packings = self._packings()
        rules = {
            "weight_packed": TensorRule(tuple((num_outputs, p.num_words(num_inputs)) for p in packings), WORDS),
            "weight_scale": TensorRule(_group_scale_shapes(num_outputs, groups), FLOAT_SCALES),
            "weight_shape": TensorRule(((2,),), INDICES, optional=True),
        }
        if not self.symmetric:
            shapes = tuple((p.num_words(num_outputs), groups) for p in packings)
            rules["weight_zero_point"] = TensorRule(shapes, WORDS)
        if self.may_have_group_index:
            rules["weight_g_idx"] = TensorRule(((num_inputs,),), INDICES, optional=True)
        return rules

    def size_of(self, shapes: dict[str, Shape]) -> tuple[int, int]:
        num_outputs, num_words = shapes["weight_packed"]
        if "weight_g_idx" in shapes:
            return num_outputs, shapes["weight_g_idx"][0]
        if 32 % self.bits == 0:
            return num_outputs, num_words * 32 // self.bits
        groups = shapes["weight_scale"][1]
        return num_outputs, groups * self.group_size if self.group_size > 0 else num_words * 32 // self.bits

    def index(self, tensor: str, shape: Shape, rows: Share, cols: Share) -> tuple[slice, ...]:
        # As in GPTQ: with a group index any group may occur anywhere.
        groups = covering(cols, self.effective_group(cols.total))
        if self.may_have_group_index:
            groups = slice(0, whole_groups(cols.total, self.effective_group(cols.total)))
        match tensor:
            case "weight_packed":
                return (rows.as_slice(), self._packing_of(shape[1], cols.total).words(cols))
            case "weight_scale":
                return (rows.as_slice() if shape[0] > 1 else slice(None), groups)
            case "weight_zero_point":
                return (self._packing_of(shape[0], rows.total).words(rows), groups)
            case "weight_g_idx":
                return (cols.as_slice(),)
            case _:
                return ()

    def output_span(self, tensor: str) -> OutputSpan | None:
        if tensor in ("weight_shape", "weight_g_idx"):
            return None
        return OutputSpan(0, Fraction(self.bits, 32) if tensor == "weight_zero_point" else Fraction(1))

    def decode(self, tensors: Tensors, rows: Share, cols: Share) -> QuantizedWeight:
        words = tensors["weight_packed"].view(torch.int32)
        codes = self._decode_packing(words.shape[1], cols).unpack(words, cols)  # [N, K]
        scales = tensors["weight_scale"].float().expand(rows.size, -1)  # [N, G]
        if self.symmetric:
            zeros = torch.full((1, 1), 1 << (self.bits - 1), dtype=torch.uint8, device=codes.device)
        else:
            zero_words = tensors["weight_zero_point"].view(torch.int32).t().contiguous()  # [G, words]
            zeros = self._decode_packing(zero_words.shape[1], rows).unpack(zero_words, rows).t().contiguous()
        group = self.effective_group(cols.total)
        stored = tensors.get("weight_g_idx")
        # -1 is what the tensor is made with: groups in their order.
        if stored is not None and not (stored == -1).any():
            groups: torch.Tensor | None = _checked(stored, "weight_g_idx", scales).to(codes.device)
        elif self.may_have_group_index:
            groups = torch.arange(cols.start, cols.stop, device=codes.device) // group
        else:
            _, groups = group_share(cols, group)
            groups = None if groups is None else groups.to(codes.device)
        return AffineWeight(codes, zeros, scales, group, self.bits, groups)

    def _decode_packing(self, num_words: int, share: Share) -> Packing:
        """The packing under which a share touches this many words."""
        dense, padded = self._packings()
        touched = dense.words(share)
        return dense if touched.stop - touched.start == num_words else padded


def _group_scale_shapes(num_outputs: int, groups: int) -> tuple[Shape, ...]:
    """A scale for every row and group; one for all (strategy `tensor`) where there is one group."""
    return ((num_outputs, groups), (1, 1)) if groups == 1 else ((num_outputs, groups),)
