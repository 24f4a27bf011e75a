"""Loading: every rank gets its own slice, reads little more than that, and damage is an error
with names."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.pure.models import tiny
from tpinfer.checkpoint.loader import load_parameters, random_parameters
from tpinfer.checkpoint.naming import checkpoint_name
from tpinfer.checkpoint.reader import CheckpointReader
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import CheckpointError
from tpinfer.config.model import ModelSpec
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.sharding.parameters import ParameterSpec, decoder_parameters
from tpinfer.sharding.partition import partition_model

NINE = tiny(num_heads=9, num_kv_heads=3, qkv_bias=True, out_bias=True, qk_norm=True)


def whole_tensors(spec: ModelSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every checkpoint tensor of the model, distinct values."""
    found = {}
    for parameter in decoder_parameters(spec, partition_model(spec, 1), DType.FLOAT32):
        cut = parameter.shard.cut_on("tp")
        for piece in parameter.shard.pieces(0):
            shape = list(parameter.shard.shape)
            if cut is not None:
                shape[cut.dim] = piece.source[1]
            found[checkpoint_name(parameter.name, piece.segment)] = torch.randn(shape).to(dtype)
    return found


def allocate_on(rank: int):
    def allocate(parameter: ParameterSpec) -> torch.Tensor:
        return torch.full(
            parameter.shard.local_shape(rank), torch.nan, dtype=to_torch(parameter.dtype)
        )

    return allocate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nine")
    save_file(whole_tensors(NINE, torch.float32), directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
def test_each_rank_gets_its_slice_and_reads_no_more(
    checkpoint: Path, size: int, dtype: DType
) -> None:
    partition = partition_model(NINE, size)
    wanted = decoder_parameters(NINE, partition, dtype)
    for rank in range(size):
        with CheckpointReader(checkpoint) as reader:
            loaded = load_parameters(reader, wanted, rank, allocate_on(rank))
            share = sum(parameter.shard.num_local_elements(rank) * 4 for parameter in wanted)
            assert share * 0.98 <= reader.bytes_read <= share * 1.02
        _assert_slices(checkpoint, wanted, loaded, rank)


def _assert_slices(
    directory: Path, wanted: tuple[ParameterSpec, ...], loaded: dict[str, torch.Tensor], rank: int
) -> None:
    from safetensors.torch import load_file

    whole = load_file(directory / "model.safetensors")
    for parameter in wanted:
        cut = parameter.shard.cut_on("tp")
        dim = cut.dim if cut else 0
        for piece in parameter.shard.pieces(rank):
            source = whole[checkpoint_name(parameter.name, piece.segment)]
            expected = source.narrow(dim, piece.source[0], piece.source[1] - piece.source[0])
            found = loaded[parameter.name].narrow(
                dim, piece.local[0], piece.local[1] - piece.local[0]
            )
            assert torch.equal(found, expected.to(found.dtype)), (parameter.name, piece)


def test_indexed_files_and_missing_prefix(tmp_path: Path) -> None:
    spec = tiny(tie_embeddings=True)
    tensors = {k.removeprefix("model."): v for k, v in whole_tensors(spec, torch.float32).items()}
    names = sorted(tensors)
    files = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    wanted = decoder_parameters(spec, partition_model(spec, 2), DType.FLOAT32)
    with CheckpointReader(tmp_path) as reader:
        loaded = load_parameters(reader, wanted, 1, allocate_on(1))
    assert torch.equal(loaded["final_norm.weight"], tensors["norm.weight"])

    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"names model-00002-of-00002\.safetensors, which is missing"
    ):
        CheckpointReader(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../secrets.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its own directory"):
        CheckpointReader(tmp_path)


def test_missing_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    spec = tiny()
    tensors = whole_tensors(spec, torch.float32)
    wanted = decoder_parameters(spec, partition_model(spec, 1), DType.FLOAT32)
    gone = "model.layers.1.self_attn.k_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / "model.safetensors")
    with (
        CheckpointReader(tmp_path) as reader,
        pytest.raises(CheckpointError, match=f"{gone} is missing"),
    ):
        load_parameters(reader, wanted, 0, allocate_on(0))
    save_file(tensors | {gone: torch.zeros(16, 60)}, tmp_path / "model.safetensors")
    match = r"k_proj\.weight: expected shape \(16, 64\) from config\.json, found \(16, 60\)"
    with CheckpointReader(tmp_path) as reader, pytest.raises(CheckpointError, match=match):
        load_parameters(reader, wanted, 0, allocate_on(0))
    save_file(
        {k: v for k, v in tensors.items() if k != "lm_head.weight"}, tmp_path / "model.safetensors"
    )
    with (
        CheckpointReader(tmp_path) as reader,
        pytest.raises(CheckpointError, match="tie_word_embeddings"),
    ):
        load_parameters(reader, wanted, 0, allocate_on(0))


def test_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        CheckpointReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"only pickle weights \(pytorch_model.bin\).*save_pretrained"
    ):
        CheckpointReader(tmp_path)


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 0.9999))
def test_truncation_anywhere_is_an_error(checkpoint: Path, share: float) -> None:
    whole = (checkpoint / "model.safetensors").read_bytes()
    directory = checkpoint / "cut"
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"cut/model\.safetensors"):
        CheckpointReader(directory)


@settings(deadline=None, max_examples=80)
@given(at=st.integers(0, 1500), value=st.integers(0, 255))
def test_damaged_headers_never_crash(checkpoint: Path, at: int, value: int) -> None:
    damaged = bytearray((checkpoint / "model.safetensors").read_bytes())
    damaged[at] = value
    directory = checkpoint / "damaged"
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(damaged)
    wanted = decoder_parameters(NINE, partition_model(NINE, 2), DType.FLOAT32)
    try:
        with CheckpointReader(directory) as reader:
            load_parameters(reader, wanted, 0, allocate_on(0))
    except CheckpointError as error:
        assert str(directory) in str(error)


def test_random_weights_are_the_same_model_on_any_rank_count() -> None:
    spec = tiny(hidden_size=72, num_heads=9, num_kv_heads=3, qkv_bias=True, vocab_size=700)
    single = decoder_parameters(spec, partition_model(spec, 1), DType.FLOAT32)
    whole = random_parameters(single, 0, 7, allocate_on(0))
    partition = partition_model(spec, 3)
    for rank in range(3):
        wanted = decoder_parameters(spec, partition, DType.FLOAT32)
        local = random_parameters(wanted, rank, 7, allocate_on(rank))
        for one, parameter in zip(single, wanted, strict=True):
            cut = parameter.shard.cut_on("tp")
            dim = cut.dim if cut else 0
            offsets = {p.segment: p.local[0] for p in one.shard.pieces(0)}
            for piece in parameter.shard.pieces(rank):
                start = offsets[piece.segment] + piece.source[0]
                expected = whole[one.name].narrow(dim, start, piece.source[1] - piece.source[0])
                found = local[parameter.name].narrow(dim, piece.local[0], expected.shape[dim])
                assert torch.equal(found, expected), parameter.name
    assert 0.019 < float(whole["embed.weight"].std()) < 0.021
