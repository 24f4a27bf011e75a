"""SVG and HTML in small pieces. Every text and attribute is escaped here, so callers need not.

Colours are classes; `page.css` gives them for light, dark and paper.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

WIDTH = 1000
"""Width of every chart in its own units; about one CSS pixel on a wide screen."""


def text_of(value: object) -> str:
    """Any value as escaped text."""
    return escape(str(value), quote=True)


def element(tag: str, content: str = "", **attributes: object) -> str:
    """One element around markup that is already safe. `class_` and `data_tip` become `class` and
    `data-tip`; attributes that are None are left out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text_of(_number(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{written}>{content}</{tag}>"


def _number(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def rect(
    x: float, y: float, width: float, height: float, class_: str, tip: str | None = None
) -> str:
    """A bar; its tip shows on hover, and as a title without scripts."""
    title = element("title", text_of(tip)) if tip else ""
    return element(
        "rect", title, x=float(x), y=float(y), width=float(max(width, 0)),
        height=float(max(height, 0)), class_=class_, data_tip=tip,
    )  # fmt: skip


def label(x: float, y: float, content: object, class_: str = "", anchor: str = "start") -> str:
    """Text at a point."""
    return element(
        "text", text_of(content), x=float(x), y=float(y), class_=class_ or None,
        text_anchor=None if anchor == "start" else anchor,
    )  # fmt: skip


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def chart(marks: Iterable[str], height: float, described: str) -> str:
    """An SVG as wide as its column, `described` for those who cannot see it."""
    content = element("title", text_of(described)) + "".join(marks)
    box = f"0 0 {WIDTH} {math.ceil(height)}"
    svg = element("svg", content, viewBox=box, role="img", xmlns="http://www.w3.org/2000/svg")
    return element("div", svg, class_="chart")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], folded: str = "") -> str:
    """A table; with `folded` behind a summary of that text. All columns but the first are numbers
    when they look like it."""
    head = "".join(element("th", text_of(name), scope="col") for name in heads)
    body = "".join(element("tr", "".join(_cell(value) for value in row)) for row in rows)
    found = element("table", element("thead", element("tr", head)) + element("tbody", body))
    found = element("div", found, class_="scrolls")
    if not folded:
        return found
    return element("details", element("summary", text_of(folded)) + found)


def _cell(value: object) -> str:
    is_number = str(value)[:1] in "0123456789-?" and len(str(value)) < 16
    return element("td", text_of(value), class_="number" if is_number else None)


def legend(names: Mapping[str, str]) -> str:
    """Class of the colour -> what it stands for."""
    items = (
        element("span", element("i", class_=f"key {class_}") + text_of(name))
        for class_, name in names.items()
    )
    return element("div", "".join(items), class_="legend")


def section(title: str, explained: str, *parts: str) -> str:
    """A heading, a sentence that says how to read what follows, and the parts."""
    content = element("h2", text_of(title))
    content += element("p", text_of(explained), class_="explained") if explained else ""
    return element("section", content + "".join(parts))


def ticks(highest: float, count: int = 4) -> list[float]:
    """Round values from 0 to at least `highest`, about `count` steps of 1, 2 or 5 times 10**n."""
    if highest <= 0:
        return [0.0, 1.0]
    rough = highest / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(highest / step * 0.999) + 1)]


def decades(lowest: float, highest: float) -> list[int]:
    """Exponents of the powers of ten that enclose a range of positive values."""
    return list(range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1))
