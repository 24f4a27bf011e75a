"""What ranks are told that share a GPU."""

from pathlib import Path

import pytest

from tpinfer.config.engine import EngineConfig
from tpinfer.config.errors import ConfigError
from tpinfer.launching.shared_device import EMULATION, preload_variables, share_device


def test_ranks_with_a_gpu_each_share_none() -> None:
    assert share_device(0, (2, 2), "auto", None) is None
    assert share_device(0, (1, 1), "nccl", None) is None


@pytest.mark.parametrize(("ranks", "num_sharing"), [((2, 1), 2), ((4, 1), 4), ((5, 2), 3)])
def test_symmetric_memory_alone_needs_no_nccl(ranks: tuple[int, int], num_sharing: int) -> None:
    found = share_device(1, ranks, "auto", None)
    assert found is not None
    assert (found.num_sharing, found.by_nccl) == (num_sharing, "")
    assert found.variables == {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    assert found.words.startswith(EMULATION) and str(num_sharing) in found.words


@pytest.mark.parametrize(("num_ranks", "blocks"), [(2, "4"), (3, "2"), (4, "2")])
def test_stock_nccl_takes_each_rank_for_a_host(num_ranks: int, blocks: str) -> None:
    found = [share_device(rank, (num_ranks, 1), "nccl", None) for rank in range(num_ranks)]
    told = [one.variables for one in found if one is not None]
    assert len({one["NCCL_HOSTID"] for one in told}) == num_ranks
    assert {one["NCCL_MAX_CTAS"] for one in told} == {blocks}
    assert all("NCCL_MULTI_RANK_GPU_ENABLE" not in one for one in told)
    assert all(one is not None and "sockets" in one.by_nccl for one in found)


def test_a_newer_nccl_must_be_loaded_first(tmp_path: Path) -> None:
    library, maps = tmp_path / "libnccl.so.2", tmp_path / "maps"
    library.touch()
    maps.write_text("7f00-7f01 r-xp 00000000 08:01 12 /usr/lib/libc.so.6\n\n")
    with pytest.raises(ConfigError, match=f"LD_PRELOAD={library}"):
        share_device(0, (2, 1), "auto", str(library), maps)
    maps.write_text(f"7f00-7f01 r-xp 00000000 08:01 12 {library}\n")
    found = share_device(0, (2, 1), "auto", str(library), maps)
    assert found is not None and "libnccl.so.2" in found.by_nccl
    assert found.variables["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    assert "NCCL_HOSTID" not in found.variables
    assert preload_variables(str(library)) == {"LD_PRELOAD": str(library)}
    assert preload_variables(None) == {}


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        preload_variables(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="add --share-device"):
        EngineConfig(tmp_path, nccl_library="libnccl.so.2")
    with pytest.raises(ConfigError, match="must be text"):
        EngineConfig(tmp_path, share_device=True, nccl_library=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="True or False"):
        EngineConfig(tmp_path, share_device=1)  # type: ignore[arg-type]
