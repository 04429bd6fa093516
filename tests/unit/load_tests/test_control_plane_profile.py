"""The in-process profile drives the production classes: it must keep up with them, and count whole steps."""

from __future__ import annotations

from load_tests.control_plane_profile import CORE_PARTS, FRONTEND_PARTS, profile_steps


async def test_every_part_of_every_step_is_timed() -> None:
    result = await profile_steps(num_rows=3, num_steps=20, generated_before=10)
    assert result["num_rows"] == 3
    assert result["num_steps"] == 20
    assert set(result["us_per_step"]) == {*CORE_PARTS, *FRONTEND_PARTS}
    assert all(us > 0 for us in result["us_per_step"].values())
    assert result["core_us"] > 0
    assert result["frontend_us"] > 0
