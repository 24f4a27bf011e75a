"""Bringing what every rank measured to one place, as framed bytes over the group."""

import msgspec
import torch

from tpinfer.collectives.group import Group
from tpinfer.costs.step_record import Measurements


def gather_bytes(group: Group, payload: bytes, device: torch.device) -> list[bytes]:
    """The payload of every rank, in rank order, on every rank."""
    length = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    lengths = torch.empty(group.size, 1, dtype=torch.int64, device=device)
    group.all_gather(lengths, length)
    widths = lengths[:, 0].tolist()
    # Whole int64 words: every backend moves those.
    num_words = -(-max(widths) // 8)
    padded = payload.ljust(num_words * 8, b"\0")
    mine = torch.frombuffer(bytearray(padded), dtype=torch.int64).to(device)
    everyone = torch.empty(group.size, num_words, dtype=torch.int64, device=device)
    group.all_gather(everyone, mine)
    rows = everyone.cpu().view(torch.uint8).numpy()
    return [rows[rank].tobytes()[:width] for rank, width in enumerate(widths)]


def exchange(group: Group, mine: Measurements, device: torch.device) -> list[Measurements]:
    """Every rank's measurements in rank order, on every rank. A collective call."""
    if group.size == 1:
        return [mine]
    gathered = gather_bytes(group, msgspec.msgpack.encode(mine), device)
    return [msgspec.msgpack.decode(payload, type=Measurements) for payload in gathered]
