"""Whose measurements a device goes by."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from stepwire_kernels.all_reduce_choice import all_reduce_choices, default_choices
from stepwire_kernels.tuned_table import Row, _rows_of, tuned_rows

LISTS = [
    ("choices", ("num_tokens", "n", "k"), ""),
    ("fused", ("num_tokens", "n", "k", "gated"), ""),
    ("gated", ("num_tokens", "n", "k"), ""),
    ("scaled", ("num_tokens", "n", "k"), ""),
    ("choices", ("ranks", "kind"), "all_reduce"),
    ("choices", ("format", "n", "k", "num_tokens"), "packed"),
    ("choices", ("format", "experts", "chosen", "hidden", "inner"), "packed_experts"),
]


@pytest.mark.parametrize(("name", "group", "directory"), LISTS)
def test_a_card_borrows_what_its_twin_measured(name: str, group: tuple[str, ...], directory: str) -> None:
    of_twin = tuned_rows("NVIDIA H100 80GB HBM3", name, group, directory)
    rows = tuned_rows("NVIDIA H200", name, group, directory)
    assert of_twin

    def alike(group_of: tuple[object, ...], of: Sequence[Row]) -> list[Row]:
        return [row for row in of if tuple(row.get(field) for field in group) == group_of]

    groups = {tuple(row.get(field) for field in group) for row in rows}
    assert groups >= {tuple(row.get(field) for field in group) for row in of_twin}
    for one in groups:
        # All of the card, whose table may have taken some over from its twin's, or all lent.
        assert alike(one, rows) == (alike(one, _rows_of("NVIDIA H200", name, directory)) or alike(one, of_twin))


def test_a_card_s_own_measurements_come_first() -> None:
    group = ("num_tokens", "n", "k")

    def measured(device: str) -> dict[tuple[object, ...], float | None]:
        # What was chosen within whole steps has no time of its own.
        return {tuple(row[field] for field in group): row.get("us") for row in tuned_rows(device, "choices", group)}

    own, of_twin = measured("NVIDIA H200"), measured("NVIDIA H100 80GB HBM3")
    # Both were measured on Llama-8B's qkv.
    shape = (1, 6144, 4096)
    assert own[shape] != of_twin[shape]


def test_nobody_else_borrows() -> None:
    for name, group, directory in LISTS:
        assert tuned_rows("NVIDIA A100-SXM4-80GB", name, group, directory) == ()
    assert all_reduce_choices("NVIDIA A100-SXM4-80GB", 2, has_norm=True) == default_choices(2)
    of_card = all_reduce_choices("NVIDIA H200", 2, has_norm=True)
    of_twin = all_reduce_choices("NVIDIA H100 80GB HBM3", 2, has_norm=True)
    # Two H200 have measured up to 32 MB, two H100 up to 2 MB.
    assert of_card[-1].max_bytes > of_twin[-1].max_bytes
    assert default_choices(2) not in (of_card, of_twin)
