"""`quant_method: auto-round` (Intel AutoRound): integers in the layout of GPTQ or of AWQ, and settings layer by layer.

Source: https://github.com/intel/auto-round (`export/export_to_autoround`).
"""

from __future__ import annotations

import re
from typing import Any

from gpu_worker.quant.affine_formats import AwqFormat, GptqFormat
from gpu_worker.quant.config import GPTQ_BITS, ConfigSection, QuantConfig, _compiled
from gpu_worker.quant.formats import WeightFormat

METHODS = ("auto-round", "auto_round", "intel/auto-round")
PLAIN_BITS = 16
_PREFIXES = re.compile(r"auto[-_]round(:|$)|intel/auto-round(:|$)")
# What follows the prefix in `packing_format` (in old files `backend`), up to a colon, and whether zero points are
# stored minus one there.
_GPTQ_LAYOUTS = {"auto_gptq": True, "gptq": True, "": False, "gptqmodel": False, "exllamav2": False, "tritonv2": False}
_AWQ_LAYOUTS = ("auto_awq", "awq")
_OF_A_NAME = re.compile(r"[\w.-]+")


def read_auto_round(section: ConfigSection) -> QuantConfig:
    packing = section.text("packing_format", section.text("backend", "auto_round:auto_gptq"))
    layout = _PREFIXES.sub("", packing, count=1).split(":")[0]
    if layout not in _GPTQ_LAYOUTS and layout not in _AWQ_LAYOUTS:
        raise section.refuse(f"auto-round with packing_format {packing!r}")

    def make(fields: dict[str, Any]) -> WeightFormat | None:
        inner = ConfigSection(fields, section._error)
        bits = inner.integer("bits", 4)
        if bits >= PLAIN_BITS:
            return None
        kind = inner.text("data_type", "int")
        if kind != "int" or inner.integer("act_bits", PLAIN_BITS) < PLAIN_BITS:
            raise section.refuse(f"auto-round with {bits} bit {kind} weights and {fields.get('act_bits')} bit inputs")
        group_size = inner.group_size(-1)
        if layout in _AWQ_LAYOUTS:
            if bits != 4:
                raise section.refuse(f"auto-round in AWQ's layout with {bits} bits")
            # The tensor of zero points is there for symmetric weights as well.
            return AwqFormat(group_size)
        if bits not in GPTQ_BITS:
            raise section.refuse(f"auto-round with {bits} bits")
        return GptqFormat(bits, group_size, zeros_minus_one=_GPTQ_LAYOUTS[layout])

    default = make(section.fields)
    exact, patterns = _overrides(section)
    formats = {name: make(section.fields | changes) for name, changes in exact.items()}
    rules = [(pattern, make(section.fields | changes)) for pattern, changes in patterns]

    def format_of(name: str) -> WeightFormat | None:
        if name in formats:
            return formats[name]
        for pattern, changed in rules:
            if pattern.search(name):
                return changed
        return None if name.split(".")[-1] == "lm_head" else default

    return QuantConfig("auto-round", format_of, f"auto-round {section.fields.get('bits', 4)} bit", otherwise=default)


def _overrides(
    section: ConfigSection,
) -> tuple[dict[str, dict[str, Any]], list[tuple[re.Pattern[str], dict[str, Any]]]]:
    """`extra_config` by name and by pattern, and `modules_to_not_convert`, whose entries are patterns."""
    extra = section.fields.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(changes, dict) for changes in extra.values()):
        raise section.error("extra_config", f"is {extra!r:.60}, expected an object of objects")
    exact = {name: changes for name, changes in extra.items() if _OF_A_NAME.fullmatch(name)}
    patterns = [
        (_compiled(section, "extra_config", name), changes) for name, changes in extra.items() if name not in exact
    ]
    patterns += [
        (_compiled(section, "modules_to_not_convert", name), {"bits": PLAIN_BITS})
        for name in section.names("modules_to_not_convert")
    ]
    return exact, patterns
