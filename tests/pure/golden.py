"""Texts that stay as they are until somebody means to change them, in `tests/pure/goldens`."""

import difflib
from pathlib import Path

GOLDENS = Path(__file__).parent / "goldens"


def check_golden(name: str, text: str, tmp_path: Path) -> None:
    """Fail with the difference, and with the command that accepts it, unless `text` is the golden
    `name`."""
    golden, found = GOLDENS / name, tmp_path / name
    expected = golden.read_text(encoding="utf-8") if golden.is_file() else ""
    if text == expected:
        return
    found.write_text(text, encoding="utf-8")
    lines = difflib.unified_diff(
        expected.splitlines(), text.splitlines(), f"goldens/{name}", "now", lineterm=""
    )
    shown = "\n".join(lines) or "the line ends differ"
    raise AssertionError(f"{shown}\n\nif the change is meant: cp {found} {golden}")
