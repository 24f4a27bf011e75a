"""A checkpoint's sampling defaults (generation_config.json), and a request's wishes on top."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpinfer.config.errors import ConfigError
from tpinfer.config.json_keys import JsonKeys
from tpinfer.config.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What generation_config.json says; None where it says nothing."""

    do_sample: bool = False
    """Whether the checkpoint wants sampling; greedy otherwise, as in transformers."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_new_tokens: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def sampling_params(self, stop_token_ids: tuple[int, ...], **wishes: Any) -> SamplingParams:
        """Parameters of a request: `wishes` (fields of SamplingParams; None means no wish), then
        these defaults where the checkpoint samples, then greedy. Raises ConfigError."""
        chosen: dict[str, Any] = {"temperature": 0.0}
        if self.do_sample:
            chosen["temperature"] = 1.0
            for name in ("temperature", "top_k", "top_p", "min_p"):
                if (value := getattr(self, name)) is not None:
                    chosen[name] = value
        if self.max_new_tokens is not None:
            chosen["max_tokens"] = self.max_new_tokens
        chosen |= {name: value for name, value in wishes.items() if value is not None}
        return SamplingParams(stop_token_ids=stop_token_ids, **chosen)


def parse_generation_defaults(generation: Mapping[str, Any], source: str) -> GenerationDefaults:
    """Those in a parsed generation_config.json. Raises ConfigError naming `source` and the key."""
    keys = JsonKeys(generation, source)
    top_k = keys.raw("top_k")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0):
        raise keys.error("top_k", "it must be a whole number of 0 (off) or more")
    bos = keys.token_ids("bos_token_id")
    found = GenerationDefaults(
        do_sample=keys.flag("do_sample", False),
        temperature=keys.optional_number("temperature", positive=False),
        top_k=top_k,
        top_p=keys.optional_number("top_p"),
        min_p=keys.optional_number("min_p", positive=False),
        max_new_tokens=keys.optional_count("max_new_tokens"),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=keys.token_ids("eos_token_id"),
    )
    try:
        found.sampling_params(())
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return found
