"""Whose measurements a device goes by."""

from __future__ import annotations

import pytest
from stepwire_kernels.all_reduce_choice import all_reduce_choices, default_choices
from stepwire_kernels.tuned_table import tuned_rows

LISTS = [
    ("choices", ("num_tokens", "n", "k"), ""),
    ("fused", ("num_tokens", "n", "k", "gated"), ""),
    ("gated", ("num_tokens", "n", "k"), ""),
    ("scaled", ("num_tokens", "n", "k"), ""),
    ("choices", ("ranks", "kind"), "all_reduce"),
    ("choices", ("format", "n", "k"), "packed"),
    ("choices", ("format", "experts", "chosen", "hidden", "inner"), "packed_experts"),
]


@pytest.mark.parametrize(("name", "group", "directory"), LISTS)
def test_a_card_borrows_what_its_twin_measured(name: str, group: tuple[str, ...], directory: str) -> None:
    of_twin = tuned_rows("NVIDIA H100 80GB HBM3", name, group, directory)
    rows = tuned_rows("NVIDIA H200", name, group, directory)
    assert of_twin
    # Alike in these fields are either all of one card or all of the other.
    lent = {tuple(row.get(field) for field in group) for row in rows if row in of_twin}
    own = {tuple(row.get(field) for field in group) for row in rows if row not in of_twin}
    assert not lent & own
    assert lent | own >= {tuple(row.get(field) for field in group) for row in of_twin}


def test_a_card_s_own_measurements_come_first() -> None:
    group = ("num_tokens", "n", "k")
    own = next(row for row in tuned_rows("NVIDIA H200", "choices", group) if (row["n"], row["k"]) == (6144, 4096))
    twin = next(row for row in tuned_rows("NVIDIA H100 80GB HBM3", "choices", group) if row["n"] == own["n"])
    assert (own["us"], twin["us"]) == (13.59, 17.74)


def test_nobody_else_borrows() -> None:
    for name, group, directory in LISTS:
        assert tuned_rows("NVIDIA A100-SXM4-80GB", name, group, directory) == ()
    assert all_reduce_choices("NVIDIA A100-SXM4-80GB", 2, has_norm=True) == default_choices(2)
    of_twin = all_reduce_choices("NVIDIA H100 80GB HBM3", 2, has_norm=True)
    assert all_reduce_choices("NVIDIA H200", 2, has_norm=True) == of_twin != default_choices(2)
