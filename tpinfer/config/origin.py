"""Where a value comes from, in four words."""

from enum import StrEnum


class Origin(StrEnum):
    """What stands behind a number."""

    SPEC = "spec"
    """A datasheet, or a topology file written by hand."""
    NVML = "nvml"
    """Read from the driver or the kernel by `topo discover`."""
    MEASURED = "measured"
    """Timed on the machine itself by `topo probe`."""
    ASSUMED = "assumed"
    """Nobody has said it: a default, or what `--set` supposes."""
