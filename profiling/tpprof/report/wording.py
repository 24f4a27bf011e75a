"""The words and number formats that every report shares."""

import textwrap

from tpinfer.costs.leaves import ROLLUP

TITLES = {
    "compute": "compute",
    "memory": "memory",
    "communication": "communication",
    "small_kernels": "small kernels",
    "host": "host",
    "queue": "queue",
}
"""The six words as people write them."""

MEANINGS = {
    "compute": "kernels whose nearest ceiling is arithmetic",
    "memory": "kernels whose nearest ceiling is memory bandwidth",
    "copy": "copies and fills, nothing else running",
    "comm_transfer": "collectives after the last rank arrived",
    "comm_wait": "collectives waiting for a later rank",
    "comm_unsplit": "collectives: wait and transfer not told apart",
    "fused_comm": "kernels that reduce and compute in one",
    "latency": "kernels too small to reach a ceiling",
    "graph_gap": "gaps between the kernels of one graph",
    "unmodelled": "kernels whose work is not known",
    "host": "idle: the host had not issued the next kernel",
    "launch_latency": "idle: a launch on its way",
    "dependency_wait": "idle: waiting for another stream",
    "host_tail": "after the last kernel: host only",
    "idle_unexplained": "idle, cause not recorded",
    "unrecorded": "the recorder lost events here",
    "queue": "request waiting to be admitted",
}
"""Leaf -> what time in it was spent on, in at most 50 characters."""

WORD_OF = {leaf: word for word, leaves in ROLLUP.items() for leaf in leaves}
"""Leaf -> the word it counts under."""


def milliseconds(spent_ns: float) -> str:
    """`12.345`; three decimals below 100 ms, fewer above."""
    value = spent_ns / 1e6
    size = abs(value)
    return f"{value:.1f}" if size >= 1000 else f"{value:.2f}" if size >= 100 else f"{value:.3f}"


def duration(spent_ns: float) -> str:
    """`850 ns`, `12.3 us`, `4.56 ms`, `1.20 s`: three significant digits."""
    size = abs(spent_ns)
    for unit, factor in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if size >= factor * 0.9995:
            value = spent_ns / factor
            return f"{value:.0f} {unit}" if abs(value) >= 99.95 else f"{value:.3g} {unit}"
    return f"{spent_ns:.0f} ns"


def percent(part: float, whole: float) -> str:
    """`7.3%`, `42%`; `-` of nothing."""
    if not whole:
        return "-"
    share = 100 * part / whole
    return f"{share:.0f}%" if abs(share) >= 9.95 or part == 0 else f"{share:.1f}%"


def shorten(text: str, width: int) -> str:
    """At most `width` characters; the middle goes first, for both ends of a kernel name tell."""
    text = printable(text)
    if len(text) <= width:
        return text
    head = (width - 2) * 2 // 3
    return f"{text[:head]}..{text[len(text) - (width - 2 - head) :]}"


def kernel_label(name: str, width: int) -> str:
    """A kernel's or op's name for a table: without `void`, parameters and the commonest
    namespaces."""
    text = printable(name).removeprefix("void ").replace("(anonymous namespace)::", "")
    text = text.replace("at::native::", "")
    depth = 0
    for place in range(len(text) - 1, 0, -1):
        depth += (text[place] == ")") - (text[place] == "(")
        if not depth:
            text = text[:place] if text[place] == "(" else text
            break
    return shorten(text, width)


def printable(text: str) -> str:
    """One line without control characters, whatever a trace calls things."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def plural(count: int, word: str) -> str:
    """`1 step`, `3 steps`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def wrapped(text: str, indent: int) -> list[str]:
    """Lines of at most 100 columns, each behind `indent` spaces."""
    space = " " * indent
    return textwrap.wrap(
        text, 100, initial_indent=space, subsequent_indent=space, break_on_hyphens=False
    )
