"""Which block holds which content: a hash chain over full blocks, so that equal prefixes share their KV."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

BlockHash = bytes

# Copied for each block: half the time of a new one, for which OpenSSL looks up the algorithm.
_EMPTY_SHA256 = hashlib.sha256()


def root_hash(tenant: str, cache_salt: str) -> BlockHash:
    """Where a chain starts: requests of different tenants or salts never meet in the cache."""
    digest = hashlib.sha256(b"stepwire prefix cache\0")
    for part in (tenant, cache_salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def extend_chain(hashes: list[BlockHash], root: BlockHash, token_ids: array[int], block_size: int) -> None:
    """Append to `hashes` the hash of every full block of `token_ids`, which go on where the hashed blocks end.

    A block's hash is the sha256 of its predecessor's hash and its own token ids (`array("I")`: four bytes each): it
    names the whole prefix, and nobody can make two prefixes collide on purpose.
    """
    previous = hashes[-1] if hashes else root
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        block = _EMPTY_SHA256.copy()
        block.update(previous)
        block.update(token_ids[start : start + block_size])
        previous = block.digest()
        hashes.append(previous)


class PrefixCache:
    """Content hash to block id. Knows nothing of holders: the pool tells it when a block is given away."""

    def __init__(self) -> None:
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def match(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Blocks of the longest cached prefix of the chain."""
        block_ids = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def insert(self, block_hash: BlockHash, block_id: int) -> bool:
        """Remember where this content is; False if another block holds the same content already."""
        if self._block_of.setdefault(block_hash, block_id) != block_id:
            return False
        self._hash_of[block_id] = block_hash
        return True

    def holds(self, block_id: int) -> bool:
        return block_id in self._hash_of

    def forget(self, block_id: int) -> None:
        """The block is about to hold something else."""
        del self._block_of[self._hash_of.pop(block_id)]

    def check_integrity(self) -> None:
        if {block_id: h for h, block_id in self._block_of.items()} != self._hash_of:
            raise RuntimeError("the prefix cache's two directions disagree")
