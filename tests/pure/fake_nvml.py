"""NVIDIA's management library as a dict: `{(field, *at): value}`; what is not in it is unknown."""

from itertools import product

from tpinfer.machine.nvml_driver import READ, Value

Fields = dict[tuple[str | int, ...], Value]


class FakeDriver:
    """Satisfies `nvml_driver.Driver`."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields

    def read(self, field: str, *at: int) -> Value | None:
        return self.fields.get((field, *at))


def cards(
    name: str, count: int, memory_mib: int, clock_mhz: int, width_bits: int, gen: int
) -> Fields:
    """`count` cards that say all about themselves and may not read each other."""
    fields: Fields = {("driver_version",): "570.86.15", ("count",): count}
    for i in range(count):
        fields |= {
            ("name", i): name,
            ("uuid", i): f"GPU-{i:08x}-0000",
            ("bus", i): f"00000000:{0x10 + i:02X}:00.0",
            ("memory_bytes", i): memory_mib << 20,
            ("memory_node", i): 0 if i < (count + 1) // 2 else 1,
            ("memory_clock_mhz", i): clock_mhz,
            ("bus_width_bits", i): width_bits,
            ("pcie_generation", i): gen,
            ("pcie_width", i): 16,
            ("mig_mode", i): 0,
        }
    return fields


def pairs(count: int, level, readable: bool) -> Fields:
    """The common ancestor of each pair, by `level(i, j)`, and whether all may read each other."""
    fields: Fields = {}
    for i, j in product(range(count), range(count)):
        if i != j:
            fields["ancestor", i, j] = level(i, j)
            fields["p2p_status", i, j, READ] = 0 if readable else 4
    return fields


def nvswitch() -> Fields:
    """A DGX H100."""
    fields = cards("NVIDIA H100 80GB HBM3", 8, 81559, 2619, 5120, 5)
    fields |= pairs(8, lambda i, j: 40 if (i < 4) == (j < 4) else 50, True)
    for i in range(8):
        fields["nvlink_mb_per_s", i] = 26562
        for link in range(18):
            fields["nvlink_active", i, link] = 1
            fields["nvlink_remote_type", i, link] = 2
            fields["nvlink_remote_bus", i, link] = f"00000000:{0xA0 + link % 4:02X}:00.0"
    return fields


def two_sockets() -> Fields:
    """Eight L40S, pairs behind a switch, four on a socket, no NVLink."""

    def level(i: int, j: int) -> int:
        return 20 if i // 2 == j // 2 else 30 if i // 4 == j // 4 else 50

    return cards("NVIDIA L40S", 8, 46068, 9001, 384, 4) | pairs(8, level, True)


def bridged() -> Fields:
    """Four H100 PCIe, two and two joined by an NVLink bridge; one end says less than the other."""
    fields = cards("NVIDIA H100 PCIe", 4, 81559, 1593, 5120, 5) | pairs(4, lambda i, j: 30, True)
    for i, link in product(range(4), range(12)):
        if i == 3 and link > 5:
            continue
        fields["nvlink_active", i, link] = 1
        fields["nvlink_remote_type", i, link] = 0
        fields["nvlink_remote_bus", i, link] = f"00000000:{0x10 + (i ^ 1):02X}:00.0"
        fields["nvlink_mb_per_s", i] = 26562
    return fields


def mig() -> Fields:
    """Two H200: one in slices, one whole."""
    fields = cards("NVIDIA H200", 2, 143771, 3201, 6144, 5) | pairs(2, lambda i, j: 50, True)
    fields |= {("mig_mode", 0): 1, ("mig_places", 0): 7}
    for place, profile in ((0, "3g.71gb"), (1, "3g.71gb")):
        fields["slice_name", 0, place] = f"NVIDIA H200 MIG {profile}"
        fields["slice_uuid", 0, place] = f"MIG-{place:04x}"
    return fields
