"""Where ranks of other hosts reach rank 0, and the secret they share. Opens nothing."""

from dataclasses import dataclass, field

from tpinfer.config.environment import Environment
from tpinfer.config.errors import ConfigError

SHORTEST_TOKEN_BYTES = 16
"""Whoever watches a handshake can try tokens at leisure: short ones would be found."""
MAKE_TOKEN = "python3 -c 'import secrets; print(secrets.token_hex(16))'"
"""How to make a token."""


@dataclass(frozen=True, slots=True)
class MeetingPoint:
    """Rank 0's address as every host knows it."""

    address: str
    """Name or address of rank 0's host. Rank 0 listens on it and on no other."""
    port: int
    """TCP port for step plans; 0 lets rank 0 take a free one."""
    token: bytes = field(repr=False)
    """Shared by all ranks of a run and never sent."""


def find_meeting_point(environment: Environment) -> MeetingPoint:
    """The meeting point of a run over several hosts: MASTER_ADDR, TPINFER_PLAN_PORT (else
    MASTER_PORT + 1) and TPINFER_TOKEN or the content of TPINFER_TOKEN_FILE.

    Raises ConfigError for what is missing; it says how to set it.
    """
    rank = environment.rank
    address = rank.master_addr if rank is not None else None
    if not address:
        raise ConfigError(
            "ranks on several hosts need MASTER_ADDR, and it is not set; export the name or "
            "address of rank 0's host on every host"
        )
    return MeetingPoint(address, _port(environment), _token(environment))


def _port(environment: Environment) -> int:
    port = environment.plan_port
    if port is None:
        rank = environment.rank
        if rank is None or rank.master_port is None:
            raise ConfigError(
                "ranks on several hosts need a port for step plans; export TPINFER_PLAN_PORT, such "
                "as 29600, on every host"
            )
        port = rank.master_port + 1  # MASTER_PORT itself is taken by the launcher's own store
    if not 0 < port < 1 << 16:
        raise ConfigError(f"port {port} for step plans must be in 1..65535; set TPINFER_PLAN_PORT")
    return port


def _token(environment: Environment) -> bytes:
    token, source = environment.token, "TPINFER_TOKEN"
    if environment.token_file is not None:
        if token is not None:
            raise ConfigError("TPINFER_TOKEN and TPINFER_TOKEN_FILE are both set; unset one")
        source = f"TPINFER_TOKEN_FILE ({environment.token_file})"
        try:
            token = environment.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source} cannot be read: {error}; name a text file") from error
    if token is None:
        raise ConfigError(
            "ranks on several hosts need a shared token, or anybody who reaches rank 0's port "
            f"could join; make one with {MAKE_TOKEN} and export it as TPINFER_TOKEN on every host"
        )
    if len(token.encode()) < SHORTEST_TOKEN_BYTES:
        raise ConfigError(
            f"{source} has {len(token.encode())} bytes and needs {SHORTEST_TOKEN_BYTES} or more; "
            f"make one with {MAKE_TOKEN}"
        )
    return token.encode()
