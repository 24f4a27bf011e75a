"""What `from tpinfer import ...` gives, without torch until something needs it."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import tpinfer


def test_the_names_there_are_and_no_others() -> None:
    assert sorted(tpinfer.__all__) == sorted(tpinfer._PLACES)
    with pytest.raises(AttributeError, match="'Llm'"):
        tpinfer.Llm  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_errors_and_sampling_need_no_torch() -> None:
    lines = (
        "from tpinfer import CheckpointError, ConfigError, RankError, SamplingParams, TpinferError",
        "import sys",
        "assert issubclass(ConfigError, (TpinferError, ValueError))",
        "print('torch' in sys.modules)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_readme_names_what_a_request_may_ask_for() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    missing = [f.name for f in fields(tpinfer.SamplingParams) if f"`{f.name}`" not in readme]
    assert not missing, f"SamplingParams has {missing}, which README.md does not name"
