"""`quant_method: bitsandbytes`: 4-bit weights (NF4, FP4), which are unpacked while they are loaded, and int8 by row.

LLM.int8() quantizes inputs as well, but for those above a threshold (https://arxiv.org/abs/2208.07339): here inputs
stay as they are, which no result gets worse by.
"""

from __future__ import annotations

from gpu_worker.quant.config import ConfigSection, QuantConfig, is_module
from gpu_worker.quant.scaled_formats import ScaledFormat

METHOD = "bitsandbytes"
INT8 = ScaledFormat("int8", "channel", scale_name="SCB", scale_divisor=127.0, layout_name="weight_format")
"""W = weight * SCB / 127: SCB holds every row's largest value."""


def read_bitsandbytes(section: ConfigSection) -> QuantConfig:
    if section.boolean("load_in_8bit", section.boolean("_load_in_8bit", False)):
        left_out = [*section.names("llm_int8_skip_modules"), "lm_head"]

        def format_of(name: str) -> ScaledFormat | None:
            return None if is_module(name, left_out) else INT8

        return QuantConfig(METHOD, format_of, "bitsandbytes int8", otherwise=INT8)
    kind = section.text("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise section.refuse(f"bitsandbytes with bnb_4bit_quant_type {kind!r}")
    return QuantConfig(METHOD, lambda name: None, f"bitsandbytes {kind}")
