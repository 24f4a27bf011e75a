"""A time by the six words of attribution."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Split:
    """Seconds by the six words of attribution."""

    compute: float = 0.0
    memory: float = 0.0
    communication: float = 0.0
    small_kernels: float = 0.0
    host: float = 0.0
    queue: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all six."""
        kernels = self.compute + self.memory + self.small_kernels
        return kernels + self.communication + self.host + self.queue

    def __add__(self, other: "Split") -> "Split":
        return Split(
            self.compute + other.compute,
            self.memory + other.memory,
            self.communication + other.communication,
            self.small_kernels + other.small_kernels,
            self.host + other.host,
            self.queue + other.queue,
        )

    def __mul__(self, factor: float) -> "Split":
        return Split(
            self.compute * factor,
            self.memory * factor,
            self.communication * factor,
            self.small_kernels * factor,
            self.host * factor,
            self.queue * factor,
        )

    __rmul__ = __mul__
