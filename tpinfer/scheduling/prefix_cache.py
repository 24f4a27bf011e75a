"""Finding KV blocks by what they hold: a chain of keys over full blocks of tokens.

The key of a block hashes its tokens and the key before it, so it stands for every token up to its
end. The first key of a chain comes from the request's salt and adapter: requests that differ in
those share nothing. BLAKE2b with 16 bytes (RFC 7693): two contents that collide would take about
2^64 tries to find. Which blocks exist and who holds them is not known here.
"""

from array import array
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import blake2b
from struct import Struct

KEY_BYTES = 16
_UNUSED_HASH = blake2b(digest_size=KEY_BYTES)
"""Copied for each key: half as long as a constructor with arguments."""


def root_key(cache_salt: str, adapter: str) -> bytes:
    """Where the chain of a request begins."""
    salt = cache_salt.encode()
    content = len(salt).to_bytes(8, "little") + salt + adapter.encode()
    return blake2b(content, digest_size=KEY_BYTES).digest()


def block_key(parent: bytes, token_ids: tuple[int, ...] | list[int]) -> bytes:
    """Key of the block with these tokens behind the block of `parent`."""
    digest = _UNUSED_HASH.copy()
    digest.update(parent + _packer(len(token_ids))(*token_ids))
    return digest.digest()


def chain_keys(parent: bytes, token_ids: tuple[int, ...] | list[int], size: int) -> Iterator[bytes]:
    """Keys of the full blocks of `size` tokens in `token_ids`, which follow those of `parent`."""
    content, step = array("q", token_ids).tobytes(), 8 * size
    for start in range(0, len(content) - step + 1, step):
        digest = _UNUSED_HASH.copy()
        digest.update(parent + content[start : start + step])
        parent = digest.digest()
        yield parent


@cache
def _packer(count: int) -> Callable[..., bytes]:
    """What writes `count` tokens as `array("q")` does, for few tokens in a fifth of the time."""
    return Struct(f"={count}q").pack


class PrefixIndex:
    """Key -> block and back, for blocks in device memory."""

    def __init__(self, num_blocks: int) -> None:
        self._block_of: dict[bytes, int] = {}
        self.key_of: list[bytes | None] = [None] * num_blocks
        """Key of each block that can be found by its content, None for the others; to be read."""

    def __len__(self) -> int:
        return len(self._block_of)

    def find(self, key: bytes) -> int | None:
        """The block with the content of `key`."""
        return self._block_of.get(key)

    def insert(self, keys: list[bytes], blocks: list[int]) -> None:
        """Let each block be found by its key. The first block with a content stays the one
        found."""
        key_of, first, stop = self.key_of, blocks[0], blocks[0] + len(keys)
        found = list(map(self._block_of.setdefault, keys, blocks))
        if found == blocks == list(range(first, stop)):  # all of them new, and adjoining
            key_of[first:stop] = keys
            return
        for key, block, first in zip(keys, blocks, found, strict=True):
            if block == first:
                key_of[block] = key

    def insert_one(self, key: bytes, block: int) -> None:
        """The same for one block."""
        if self._block_of.setdefault(key, block) == block:
            self.key_of[block] = key

    def remove(self, block: int) -> bytes | None:
        """Let `block` not be found any more; returns its key if it had one."""
        key = self.key_of[block]
        if key is not None:
            self.key_of[block] = None
            del self._block_of[key]
        return key
