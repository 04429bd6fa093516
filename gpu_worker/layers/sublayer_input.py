"""What a sublayer reads: the norm of a residual that the sublayer before has joined."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gpu_worker.layers.ops import LayerOps, QuantizedRows

if TYPE_CHECKING:
    from gpu_worker.layers.linear import Linear
    from gpu_worker.layers.norm import Norm
    from gpu_worker.parallel.shares import ParallelContext


class SublayerInput:
    """norm(residual + output), not computed before somebody reads it.

    A linear that reads it first may compute sum and norm itself (`through`), where the device's operations can do that
    in one launch. `residual` is the sum once it has been read; until then it lacks `output`.
    """

    def __init__(
        self,
        ops: LayerOps,
        output: torch.Tensor | None,
        residual: torch.Tensor,
        norm: Norm | None,
        sums: ParallelContext | None = None,
    ) -> None:
        """output: what joins the residual (None: nothing does), both [num_tokens, hidden]; both may be overwritten.

        `norm` None: the sum itself is read. `sums`: output is one summand, and these ranks have the others.
        """
        self.residual = residual
        self._ops, self._output, self._norm, self._sums = ops, output, norm, sums
        self._rows: torch.Tensor | None = None
        self._normed: list[torch.Tensor] = []

    @classmethod
    def of(cls, ops: LayerOps, rows: torch.Tensor) -> SublayerInput:
        """Rows that are ready to be read, [num_tokens, hidden]."""
        return cls(ops, None, rows, None)

    def rows(self) -> torch.Tensor:
        """As a tensor, [num_tokens, hidden]."""
        if self._rows is None:
            if self._normed:
                self._rows = torch.cat(self._normed)
            elif self._norm is not None:
                self._rows = self._ops.add_norm(self._output, self.residual, self._norm, self._sums)
            else:
                self._rows = self.residual if self._output is None else self.residual.add_(self._output)
            self._output = None
        return self._rows

    def through(self, linear: Linear, activation: str | None = None) -> torch.Tensor:
        """The linear's product [num_tokens, outputs], or act(gate) * up of it [num_tokens, outputs / 2]."""
        product, is_gated = self.through_gated(linear, activation)
        return product if activation is None or is_gated else self._ops.gated_activation(product, activation)

    def through_gated(self, linear: Linear, activation: str | None) -> tuple[torch.Tensor, bool]:
        """(`through`, True) where that is one launch with the product, else (the product alone, False)."""
        product = self._product_in_pieces(linear)
        if product is not None:
            return product, False
        weight = linear.method.plain_weight()
        product = None if weight is None else self.times(weight, activation)
        if product is None and weight is not None and activation is not None:
            product = self._ops.gated_linear(self.rows(), weight, activation)
        if product is not None:
            return product, activation is not None
        quantized = self._quantized(linear)
        if quantized is None:
            return linear.apply(self.rows()), False
        if activation is not None:
            product = linear.method.apply_quantized_gated(quantized, activation)
        return (linear.apply_quantized(quantized), False) if product is None else (product, True)

    def _product_in_pieces(self, linear: Linear) -> torch.Tensor | None:
        """The linear's product where sums are under way: of each piece of rows as it comes, while others do.

        None: none are, or copying the parts would cost more.
        """
        output, norm, sums = self._output, self._norm, self._sums
        if output is None or norm is None or sums is None or not linear.method.writes_into():
            return None
        pieces = sums.under_way(output)
        if not pieces:
            return None
        product = output.new_empty(len(output), linear.shape.num_outputs)  # [num_tokens, outputs]
        for rows in pieces:
            normed = self._ops.add_norm(output[rows], self.residual[rows], norm, sums)
            linear.method.apply_into(normed, product[rows])
            self._normed.append(normed)
        self._output = None
        return product

    def _quantized(self, linear: Linear) -> QuantizedRows | None:
        """The rows as the linear multiplies them, where norm and quantization are one launch."""
        quant = linear.method.row_quant()
        if quant is None or self._rows is not None or self._norm is None or self._sums is not None:
            return None
        quantized = self._ops.quantized_norm(self._output, self.residual, self._norm, quant)
        if quantized is not None:
            self._output = None
        return quantized

    def times(
        self, weight: torch.Tensor, activation: str | None = None, *, keeps_rows: bool = False
    ) -> torch.Tensor | None:
        """`through` for a weight [outputs, hidden], where norm and product are one launch; else None.

        `keeps_rows`: others read the rows too.
        """
        if self._rows is not None or self._norm is None or self._sums is not None:
            return None
        fused = self._ops.linear_of_norm(
            self._output, self.residual, self._norm, weight, activation, keeps_normed=keeps_rows
        )
        if fused is None:
            return None
        self._output, self.residual, self._rows = None, fused.residual, fused.normed
        return fused.product
