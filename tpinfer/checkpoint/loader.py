"""A rank's parameters, read from a checkpoint by their shard specs or made up at random.

No tensor is ever whole in memory unless the rank keeps all of it.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch

from tpinfer.checkpoint.naming import checkpoint_name, find_name
from tpinfer.checkpoint.reader import CheckpointReader, TensorEntry
from tpinfer.checkpoint.transforms import read_slice
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import CheckpointError
from tpinfer.sharding.parameters import ParameterSpec
from tpinfer.sharding.spec import Piece

Allocate = Callable[[ParameterSpec], torch.Tensor]
Progress = Callable[[int, int], None]
_FILE_DTYPES = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16)
_BLOCK_ROWS = 256
_STD = 0.02


def load_parameters(
    reader: CheckpointReader,
    parameters: Sequence[ParameterSpec],
    rank: int,
    allocate: Allocate,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Read `rank`'s share of every parameter into memory that `allocate` gives.

    progress(bytes done, bytes in all) is called after each parameter. Raises CheckpointError
    naming file, tensor, expected and found; every tensor is looked up before the first one is
    read.
    """
    plan = [
        (p, [(piece, _locate(reader, p, piece)) for piece in p.shard.pieces(rank)])
        for p in parameters
    ]
    total = sum(parameter.local_bytes(rank) for parameter in parameters)
    loaded: dict[str, torch.Tensor] = {}
    done = 0
    for parameter, pieces in plan:
        tensor = allocate(parameter)
        for piece, entry in pieces:
            _read_piece(reader, parameter, piece, entry, tensor)
        loaded[parameter.name] = tensor
        done += parameter.local_bytes(rank)
        if progress is not None:
            progress(done, total)
    return loaded


def _locate(reader: CheckpointReader, parameter: ParameterSpec, piece: Piece) -> TensorEntry:
    wanted = checkpoint_name(parameter.name, piece.segment)
    name = find_name(wanted, reader.tensors)
    if name is None:
        hint = (
            "set tie_word_embeddings if the head reuses the embedding"
            if parameter.name == "head.weight"
            else "config.json and weights are of different models, or a file is missing"
        )
        raise CheckpointError(f"{reader.directory}: tensor {wanted} is missing; {hint}")
    entry = reader.tensors[name]
    expected = list(parameter.shard.shape)
    cut = parameter.shard.cut_on("tp")
    if cut is not None:
        expected[cut.dim] = next(s.size for s in cut.segments if s.name == piece.segment)
    if entry.dtype not in _FILE_DTYPES:
        raise CheckpointError(
            f"{entry.file}: tensor {name}: expected {', '.join(_FILE_DTYPES)}, found "
            f"{entry.dtype}, whose scales config.json does not describe; use the original weights"
        )
    if entry.shape != tuple(expected):
        raise CheckpointError(
            f"{entry.file}: tensor {name}: expected shape {tuple(expected)} from config.json, "
            "found "
            f"{entry.shape}; config.json and weights are of different models"
        )
    return entry


def _read_piece(
    reader: CheckpointReader,
    parameter: ParameterSpec,
    piece: Piece,
    entry: TensorEntry,
    tensor: torch.Tensor,
) -> None:
    cut = parameter.shard.cut_on("tp")
    if cut is not None and cut.dim == 1:
        read_slice(reader, entry, (0, entry.shape[0]), piece.source, tensor)
    else:
        start, stop = piece.local
        read_slice(reader, entry, piece.source, None, tensor[start:stop])


def random_parameters(
    parameters: Sequence[ParameterSpec], rank: int, seed: int, allocate: Allocate
) -> dict[str, torch.Tensor]:
    """Made-up weights: norms 1, biases 0, the rest uniform with standard deviation 0.02.

    A value depends on seed, parameter, segment and its place in the whole tensor, so every rank
    count holds the same model; drawn where the tensor lies, it differs between CPUs and GPUs.
    Blocks of rows are drawn whole and sliced: a row-parallel weight costs each rank all its
    columns.
    """
    made: dict[str, torch.Tensor] = {}
    for parameter in parameters:
        tensor = allocate(parameter)
        if len(parameter.shard.shape) == 1:
            tensor.fill_(0.0 if parameter.name.endswith("bias") else 1.0)
        else:
            for piece in parameter.shard.pieces(rank):
                _draw_piece(parameter, piece, seed, tensor)
        made[parameter.name] = tensor
    return made


def _draw_piece(parameter: ParameterSpec, piece: Piece, seed: int, tensor: torch.Tensor) -> None:
    cut = parameter.shard.cut_on("tp")
    num_rows, width = parameter.shard.shape
    by_column = cut is not None and cut.dim == 1
    rows = (0, num_rows) if by_column else piece.source
    columns = piece.source if by_column else (0, width)
    target = tensor if by_column else tensor[piece.local[0] : piece.local[1]]
    bound = _STD * 3**0.5  # a uniform of half-width b has standard deviation b / sqrt(3)
    for block in range(rows[0] // _BLOCK_ROWS, -(-rows[1] // _BLOCK_ROWS)):
        first = block * _BLOCK_ROWS
        start, stop = max(first, rows[0]), min(first + _BLOCK_ROWS, rows[1])
        key = f"{seed}/{parameter.name}/{piece.segment}/{block}".encode()
        generator = torch.Generator(tensor.device).manual_seed(
            int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 1
        )
        drawn = torch.empty(_BLOCK_ROWS, width, device=tensor.device)
        drawn.uniform_(-bound, bound, generator=generator)
        part = drawn[start - first : stop - first, columns[0] : columns[1]]
        target[start - rows[0] : stop - rows[0]].copy_(part)
