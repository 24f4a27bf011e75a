"""What removing one cause would win, as bars."""

from tpinfer.costs.leaves import ROLLUP
from tpprof.report.html_svg import WIDTH, chart, label, rect
from tpprof.report.whatif import Answer
from tpprof.report.wording import milliseconds, percent, shorten

_LEFT, _STEP, _BAR, _MOST = 300, 30, 20, 12


def whatif_bars(answer: Answer) -> str:
    """A bar a cause, the largest gain first; empty where nothing would be won."""
    shown = [one for one in answer.removals if one.gain_ns > 0][:_MOST]
    if not shown:
        return ""
    scale = (WIDTH - _LEFT - 240) / max(one.gain_ns for one in shown)
    marks: list[str] = []
    for i, one in enumerate(shown):
        y = 4 + i * _STEP
        gain, wall = one.gain_ns / answer.num_steps, one.wall_ns / answer.num_steps
        faster = f", {answer.wall_ns / one.wall_ns:.2f}x" if one.wall_ns > 0 else ""
        text = f"{milliseconds(gain)} ms ({percent(one.gain_ns, answer.wall_ns)}{faster})"
        tip = f"{one.cause}: {one.meaning}\nwins {text}, leaves {milliseconds(wall)} ms"
        marks.append(label(_LEFT - 10, y + 14, shorten(one.meaning, 44), "name", "end"))
        marks.append(rect(_LEFT, y, one.gain_ns * scale, _BAR, f"bar {_colour(one.cause)}", tip))
        marks.append(label(_LEFT + one.gain_ns * scale + 8, y + 14, text, "value"))
    return chart(marks, 8 + len(shown) * _STEP, "What removing one cause would win")


def _colour(cause: str) -> str:
    """Class of the word that a cause counts under."""
    word = cause.partition(":")[0]
    if word == "wait":
        return "wait"
    if word in ("transfer", "communication"):
        return "communication"
    return next((w for w, leaves in ROLLUP.items() if word == w or word in leaves), "total")
