"""A layer's path in the model to names in the checkpoint, by a family's name rules."""

from __future__ import annotations

from collections.abc import Mapping

_PLACEHOLDERS = ("{i}", "{e}")


def path_template(path: str) -> str:
    """`layers.3.mlp.experts.7.down` -> `layers.{i}.mlp.experts.{e}.down`: the rules' name of a layer."""
    placeholders = iter(_PLACEHOLDERS)
    return ".".join(next(placeholders) if piece.isdigit() else piece for piece in path.split("."))


def checkpoint_modules(name_rules: Mapping[str, Mapping[str, str]], path: str) -> dict[str, str]:
    """Parts as the rules join them (`"q+k+v"`) -> module in the checkpoint; empty for a layer that has no rule."""
    numbers = [piece for piece in path.split(".") if piece.isdigit()]
    modules = {}
    for parts, name in name_rules.get(path_template(path), {}).items():
        for placeholder, number in zip(_PLACEHOLDERS, numbers, strict=False):
            name = name.replace(placeholder, number)
        modules[parts] = name
    return modules
