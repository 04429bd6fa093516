"""Ranks that do not find together, over a real store."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.parallel.layout import GroupError, GroupLayout, Place
from gpu_worker.parallel.process_group import RankGroup, StoreServer


def test_who_did_not_come_to_the_store_is_named() -> None:
    server = StoreServer("127.0.0.1")
    place = Place(0, GroupLayout(1, (1, 1)), store_address=server.address, timeout_s=0.5)
    with pytest.raises(GroupError, match=r"^rank 1 \(stage 1 of 2\) did not come to the group's store at .* 0\.5 s"):
        RankGroup(place, torch.device("cpu"), server)
