"""What a user can rely on, as goldens: verbs, flags and help texts, settings and their defaults."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from tests.pure.golden import GOLDENS, check_golden
from tpinfer.cli.main import ORIENTATION, VERBS, build_parser, main
from tpinfer.config.engine import EngineConfig
from tpinfer.config.sampling import SamplingParams


@pytest.fixture(autouse=True)
def fixed_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """argparse wraps help to the terminal."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")


def help_text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    check_golden("help.txt", help_text(capsys), tmp_path)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    check_golden(f"help_{verb}.txt", help_text(capsys, verb), tmp_path)


def test_no_golden_outlives_its_verb() -> None:
    assert {path.stem for path in GOLDENS.glob("help_*.txt")} == {f"help_{verb}" for verb in VERBS}


def test_without_a_verb_a_newcomer_is_shown_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert shown == ORIENTATION + "\n"
    for verb in ("generate", "doctor"):
        assert f"tpinfer {verb}" in shown
    assert max(len(line) for line in shown.splitlines()) <= 100


def verb_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb."""
    (verbs,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(verbs.choices)


def test_verbs_are_those_of_the_table() -> None:
    assert list(verb_parsers()) == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_terminal_and_explains_what_is_not_plain(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = help_text(capsys, verb).splitlines()
    assert max(len(line) for line in examples) <= 100
    unexplained = [
        action.option_strings[0]
        for action in verb_parsers()[verb]._actions
        if action.option_strings and not action.help and not action.choices
    ]
    assert unexplained == [], "a flag without choices needs a help text"


@pytest.mark.parametrize("verb", VERBS)
def test_defaults_named_in_help_are_the_real_ones(verb: str) -> None:
    """`(16)` in a help text is the flag's default."""
    for action in verb_parsers()[verb]._actions:
        default = action.default
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert f"({default:g})" in (action.help or ""), f"{action.option_strings}: {default}"


@pytest.mark.parametrize("config", [EngineConfig, SamplingParams])
def test_settings(config: type, tmp_path: Path) -> None:
    lines = []
    for field in dataclasses.fields(config):
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        lines.append(f"{field.name}: {kind}{default}\n")
    check_golden(f"fields_{config.__name__}.txt", "".join(lines), tmp_path)
