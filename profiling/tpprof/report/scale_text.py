"""The scale waterfall for a terminal: at most 100 columns."""

from collections.abc import Sequence

from tpprof.report.scale import Waterfall
from tpprof.report.wording import milliseconds, percent, shorten, wrapped

_PICTURE, _MOST_FIXES = 24, 6


def render_waterfalls(waterfalls: Sequence[Waterfall]) -> str:
    """One table a run, the smallest first, then what to do."""
    blocks = [_table(one) for one in waterfalls]
    blocks.append("\n".join(_buys(waterfalls[-1])))
    return "\n\n".join(blocks)


def _table(one: Waterfall) -> str:
    windows = f", mean of {one.num_windows} windows" if one.num_windows > 1 else ""
    who = ", which waits most" if one.waits else ""
    lines = wrapped(
        f"tp={one.tp} against tp={one.smallest_tp} on rank {one.rank}{who}{windows}: "
        f"{one.speedup:.2f}x as fast, {percent(one.efficiency, 1)} of ideal",
        0,
    )
    lines.append(f"{'ms':>38}{'':{_PICTURE + 2}}{'of real':>8}")
    spans = [("ideal", 0, one.ideal_ns, "")]
    reached = one.ideal_ns
    for bar in one.bars:
        spans.append((bar.title, reached, reached + bar.spent_ns, bar.detail))
        reached += bar.spent_ns
    spans.append(("real", 0, one.real_ns, ""))
    lowest = min(min(low, high) for _, low, high, _ in spans)
    width = max(max(low, high) for _, low, high, _ in spans) - lowest or 1
    for title, low, high, detail in spans:
        spent = milliseconds((high - low) / one.num_windows)
        picture = _picture(min(low, high) - lowest, max(low, high) - lowest, width)
        share = percent(high - low, one.real_ns)
        text = f"{shorten(title, 28):<28}{spent:>10}  {picture}{share:>8}  {shorten(detail, 26)}"
        lines.append(text.rstrip())
    lines += [line for doubt in one.warnings for line in wrapped(f"warning: {doubt}", 0)]
    return "\n".join(lines)


def _picture(low: int, high: int, width: int) -> str:
    """[low, high) of [0, width) as a bar; at least one mark where it is not empty."""
    begin = round(low / width * _PICTURE)
    end = max(round(high / width * _PICTURE), begin + (high > low))
    end = min(end, _PICTURE)
    begin = min(begin, end - (high > low))
    return (" " * begin + "#" * (end - begin)).ljust(_PICTURE)


def _buys(one: Waterfall) -> list[str]:
    if not one.fixes:
        return [f"tp={one.tp} lost nothing against tp={one.smallest_tp}."]
    lines = [f"What each fix buys at tp={one.tp} (now {one.speedup:.2f}x), at most"]
    for fix in one.fixes[:_MOST_FIXES]:
        gained = percent(fix.saved_ns, one.real_ns)
        how = " by replay" if fix.is_replayed else ""
        lines.append(
            f"  {shorten(fix.title, 28):<28}{fix.speedup:>6.2f}x  saves {gained:>5} of real{how}"
        )
        lines += wrapped(fix.remedy, 6)
    return lines
