"""Answers of `whatif` for a terminal: at most 100 columns."""

from tpprof.report.whatif import Answer
from tpprof.report.wording import milliseconds, percent, plural, shorten, wrapped


def render_whatif(answer: Answer) -> str:
    """The wall as recorded, then each cause removed, the largest gain first."""
    per = f", mean of {plural(answer.num_steps, 'step')}" if answer.num_steps > 1 else ""
    lines = wrapped(
        f"Wall of rank {answer.rank} replayed along {plural(answer.num_meetings, 'meeting')} of "
        f"ranks{per}, with one cause removed at a time",
        0,
    )
    lines.append(f"{'ms':<56}{'wall':>12}{'gain':>12}{'share':>8}{'faster':>9}")
    lines.append(f"{'as recorded':<56}{milliseconds(answer.wall_ns / answer.num_steps):>12}")
    for one in answer.removals:
        wall, gain = one.wall_ns / answer.num_steps, one.gain_ns / answer.num_steps
        faster = f"{answer.wall_ns / one.wall_ns:.2f}x" if one.wall_ns > 0 else "-"
        name = f"{shorten(one.cause, 18):<19}{shorten(one.meaning, 36)}"
        share = percent(one.gain_ns, answer.wall_ns)
        lines.append(
            f"{name:<56}{milliseconds(wall):>12}{milliseconds(gain):>12}{share:>8}{faster:>9}"
        )
    if not answer.removals:
        lines.append("nothing that was asked about took time")
    lines += wrapped("A gain is an upper bound: no other work moves into the time won.", 0)
    lines += [line for text in answer.warnings for line in wrapped(f"warning: {text}", 0)]
    return "\n".join(lines)
