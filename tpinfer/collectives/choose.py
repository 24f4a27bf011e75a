"""Which backend carries the collectives, and why. Pure: the same facts give the same choice."""

from dataclasses import dataclass, replace

from tpinfer.config.errors import ConfigError
from tpinfer.config.units import format_size
from tpinfer.costs.collective_sizes import CollectiveCurves, collective_by_size


@dataclass(frozen=True, slots=True)
class CollectiveFacts:
    """What the choice depends on."""

    device_type: str
    """`cpu` or `cuda`."""
    world: int
    local_world: int
    launcher: str
    num_gpus: int
    has_mpi: bool
    """mpi4py can be imported."""
    has_native_ring: bool
    ring_reason: str
    """Why there is no native ring."""
    deepspeed_reason: str | None
    """Why DeepSpeed's op is not used; None where it is."""
    machine: str = "x86_64"
    shares_device: bool = False
    """Ranks sit on one GPU on purpose."""
    nccl_shares: str = ""
    """By what NCCL lets ranks share a GPU; empty where it does not."""


@dataclass(frozen=True, slots=True)
class CollectiveChoice:
    """The backend and the number or fact behind it."""

    name: str
    """`none`, `nccl`, `gloo`, `mpi`, `shared_memory` or `symmetric_memory`."""
    variant: str
    """For `shared_memory`: `deepspeed`, `native` or `python`; for `nccl`: `symmetric` where a
    symmetric pool is asked for."""
    reason: str
    large: "CollectiveChoice | None" = None
    """What sums messages of `from_bytes` and more, where that is worth a second backend."""
    from_bytes: int = 0
    rest: str = ""
    """For `symmetric_memory`, what carries everything else: `nccl`, or `gloo` through the host."""

    @property
    def words(self) -> str:
        """What was chosen, for people."""
        named = f"{self.name} {self.variant}".strip()
        if self.large is None:
            return named
        return f"{named}; for {format_size(self.from_bytes)} and more {self.large.words}"


def choose_collective(
    wanted: str, facts: CollectiveFacts, curves: CollectiveCurves | None = None
) -> CollectiveChoice:
    """`wanted` is the user's word or `auto`; `curves` what is known of backends' times over sizes.
    Raises ConfigError for what cannot work here."""
    if facts.world == 1:
        return CollectiveChoice("none", "", "one rank has nobody to talk to")
    _refuse(wanted, facts)
    if wanted != "auto":
        return _backend(wanted, "asked for", facts)
    if curves is None or _has_symmetric_memory(facts):
        return _backend(*_automatic(facts), facts)
    return _by_size(curves, facts)


def _by_size(curves: CollectiveCurves, facts: CollectiveFacts) -> CollectiveChoice:
    """By the times of those backends that can be used now."""
    refused = {name: why for name in curves.names() if (why := _refusal(name, facts))}
    usable = [name for name in curves.names() if name not in refused]
    found = collective_by_size(curves, usable)
    left_out = "".join(f"; {name} cannot be used: {why}" for name, why in refused.items())
    if found is None:
        name, why = _automatic(facts)
        return _backend(name, why + left_out, facts)
    small = _backend(found.small, found.reason + left_out, facts)
    if found.large is None:
        return small
    large = _backend(found.large, found.reason, facts)
    return replace(small, large=large, from_bytes=found.from_bytes)


def _backend(wanted: str, why: str, facts: CollectiveFacts) -> CollectiveChoice:
    if wanted == "deepspeed":
        return CollectiveChoice("shared_memory", "deepspeed", why)
    if wanted == "nccl_symmetric":
        return CollectiveChoice("nccl", "symmetric", why)
    if wanted == "symmetric_memory":
        if not facts.shares_device:
            return CollectiveChoice(wanted, "", why, rest="nccl")
        if facts.nccl_shares:
            return CollectiveChoice(wanted, "", f"{why}; {facts.nccl_shares}", rest="nccl")
        why += "; gloo through the host beside it, since stock NCCL refuses ranks on one GPU"
        return CollectiveChoice(wanted, "", why, rest="gloo")
    if wanted == "nccl" and facts.shares_device:
        why += f"; {facts.nccl_shares}"
    if wanted != "shared_memory":
        return CollectiveChoice(wanted, "", why)
    if facts.has_native_ring:
        return CollectiveChoice(
            wanted,
            "native",
            f"{why}; own compiled ring, which yields a core that others want",
        )
    if facts.deepspeed_reason is None:
        return CollectiveChoice(
            wanted, "deepspeed", f"{why}; DeepSpeed's op, since {facts.ring_reason}"
        )
    return CollectiveChoice(wanted, "python", f"{why}; Python ring, since {facts.ring_reason}")


def _refusal(name: str, facts: CollectiveFacts) -> str:
    """Why a backend cannot be used here; empty where it can."""
    try:
        _refuse(name, facts)
    except ConfigError as error:
        return str(error)
    return ""


def _automatic(facts: CollectiveFacts) -> tuple[str, str]:
    if _has_symmetric_memory(facts):
        return "symmetric_memory", "GPU ranks of one host"
    if facts.device_type == "cuda":
        return "nccl", "GPU ranks" + (f", {_share(facts)}" if _has_hosts(facts) else "")
    if not _has_hosts(facts):
        if facts.has_native_ring or facts.machine in ("x86_64", "AMD64"):
            return "shared_memory", "all ranks share a host"
        return "gloo", f"the Python ring needs x86 and {facts.ring_reason}"
    if facts.launcher == "mpirun" and facts.has_mpi:
        return "mpi", f"{_share(facts)}, and mpirun connects them"
    return "gloo", _share(facts)


def _has_symmetric_memory(facts: CollectiveFacts) -> bool:
    return facts.device_type == "cuda" and not _has_hosts(facts)


def _has_hosts(facts: CollectiveFacts) -> bool:
    return facts.world != facts.local_world


def _share(facts: CollectiveFacts) -> str:
    return f"ranks on several hosts, {facts.local_world} of {facts.world} here"


def _refuse(wanted: str, facts: CollectiveFacts) -> None:
    if wanted in ("nccl", "nccl_symmetric") and facts.device_type != "cuda":
        instead = "gloo" if _has_hosts(facts) else "shared_memory"
        raise ConfigError(
            f"--collective {wanted} needs GPU ranks, these compute on the CPU; use {instead}"
        )
    if wanted == "nccl_symmetric" and (_has_hosts(facts) or facts.shares_device):
        raise ConfigError(
            "--collective nccl_symmetric needs ranks of one host with a GPU each; use nccl"
        )
    if wanted == "symmetric_memory" and not _has_symmetric_memory(facts):
        instead = "nccl" if facts.device_type == "cuda" else "shared_memory"
        raise ConfigError(
            f"--collective symmetric_memory needs GPU ranks of one host; use {instead}"
        )
    is_shared = facts.shares_device and (facts.nccl_shares or wanted != "nccl")
    needs_own = wanted in ("nccl", "nccl_symmetric", "symmetric_memory")
    if needs_own and facts.local_world > facts.num_gpus and not is_shared:
        raise ConfigError(
            f"--collective {wanted} needs a GPU per rank: {facts.local_world} ranks, "
            f"{facts.num_gpus} GPUs; start fewer ranks, or try out with --share-device"
        )
    if wanted in ("shared_memory", "deepspeed", "mpi") and facts.device_type == "cuda":
        raise ConfigError(
            f"--collective {wanted} carries CPU tensors, these ranks have GPUs; use nccl"
        )
    if wanted in ("shared_memory", "deepspeed") and _has_hosts(facts):
        raise ConfigError(
            f"--collective {wanted} stays on one host, but only {facts.local_world} of "
            f"{facts.world} ranks are here; use gloo"
        )
    if wanted == "deepspeed" and facts.deepspeed_reason is not None:
        raise ConfigError(
            f"--collective deepspeed cannot be used: {facts.deepspeed_reason}; use shared_memory"
        )
    if wanted == "mpi" and facts.launcher != "mpirun":
        raise ConfigError(
            "--collective mpi needs ranks started by mpirun, these come from "
            f"{facts.launcher}; use launch/mpirun.sh"
        )
    if wanted == "mpi" and not facts.has_mpi:
        raise ConfigError("--collective mpi needs mpi4py; pip install 'tpinfer[mpi]'")


def deepspeed_reason(is_built: bool, not_safe: str | None) -> str | None:
    """Why DeepSpeed's op is not used: unsafe here, or safe but not built."""
    return not_safe or (None if is_built else "DeepSpeed's op is not built")
