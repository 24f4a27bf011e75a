"""Finished requests as JSON lines, one object per prompt; these keys stay as they are."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tpinfer.cli.stream import write_out
from tpinfer.config.errors import ConfigError

if TYPE_CHECKING:
    from tpinfer.engine.requests import Completion, GenerationResult
    from tpinfer.steps.logprobs import TokenLogprobs


def write_results(name: str, results: "Sequence[GenerationResult]") -> None:
    """Write to the file `name`, or to standard output for `-`. Raises ConfigError."""
    # A file is UTF-8; standard output is what the locale makes of it.
    plain = name == "-" and sys.stdout.encoding.lower() not in ("utf-8", "utf8")
    lines = [json.dumps(result_json(result), ensure_ascii=plain) + "\n" for result in results]
    if name == "-":
        write_out(sys.stdout, "".join(lines))
        return
    try:
        Path(name).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{name}: cannot be written ({error.strerror}); pass another --json"
        ) from error


def result_json(result: "GenerationResult") -> dict[str, object]:
    """One request. The first continuation's keys stand at the top; `outputs` has all where there
    are several."""
    value: dict[str, object] = {"prompt_token_ids": result.prompt_token_ids}
    value |= _completion(result.outputs[0])
    value["num_cached_tokens"] = result.num_cached_tokens
    if result.prompt_logprobs is not None:
        value["prompt_logprobs"] = [
            None if one is None else _position(one) for one in result.prompt_logprobs
        ]
    if len(result.outputs) > 1:
        value["outputs"] = [_completion(output) for output in result.outputs]
    return value


def _completion(output: "Completion") -> dict[str, object]:
    timing = output.timing
    value: dict[str, object] = {
        "token_ids": output.token_ids,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "timing": None if timing is None else {
            "ttft_s": timing.ttft_s,
            "tpot_s": timing.tpot_s,
            "e2e_s": timing.e2e_s,
            "itl_s": timing.itl_s,
        },
        "attribution": output.attribution.to_json() if output.attribution else None,
    }  # fmt: skip
    if output.error is not None:
        value["error"] = output.error
    if output.logprobs is not None:
        value["logprobs"] = [_position(one) for one in output.logprobs]
    return value


def _position(found: "TokenLogprobs") -> dict[str, object]:
    top = zip(found.top_token_ids, found.top_logprobs, strict=True)
    return {
        "token_id": found.token_id,
        "logprob": found.logprob,
        "top": [[token, logprob] for token, logprob in top],
    }
