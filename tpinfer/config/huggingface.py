"""From a checkpoint's config.json to a `ModelSpec`. Reads transformers 4's key names and 5's.

Absent keys take the defaults of transformers' config classes, except sizes, which must be there.
Does not open weights or tokenizers, and never goes to the network.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpinfer.config.dtypes import DType
from tpinfer.config.environment import read_environment
from tpinfer.config.errors import ConfigError
from tpinfer.config.generation import GenerationDefaults, parse_generation_defaults
from tpinfer.config.json_keys import JsonKeys, read_json_object
from tpinfer.config.model import ModelSpec
from tpinfer.config.rope import parse_rope

WEIGHT_DTYPES = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16)
MAX_LAYERS = 10_000
"""A damaged count beyond it would take all memory before anything else could refuse it."""


@dataclass(frozen=True, slots=True)
class _Family:
    """What transformers' class of one architecture says about absent keys and fixed traits."""

    model_type: str
    max_position: int
    num_kv_heads: int | None
    """Where the key is absent; None means as many as query heads."""
    head_dim: int | None = None
    """Where the key is absent; None means hidden_size / heads."""
    qkv_bias: bool | None = None
    """None where `attention_bias` decides."""
    out_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    slides: str = "never"
    """`never`, `all layers` once a window is given, or `some layers` if `use_sliding_window`."""
    special_ids: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """Beginning- and end-of-sequence tokens where the keys are absent."""


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", 2048, None, mlp_bias=None, special_ids=((1,), (2,))),
    "MistralForCausalLM": _Family(
        "mistral", 131072, 8, None, False, False, slides="all layers", special_ids=((1,), (2,))
    ),
    "Qwen2ForCausalLM": _Family("qwen2", 32768, 32, None, True, False, slides="some layers"),
    "Qwen3ForCausalLM": _Family("qwen3", 32768, 32, 128, qk_norm=True, slides="some layers"),
}
SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)


def read_model_spec(directory: Path) -> ModelSpec:
    """Read config.json, and generation_config.json where there is one.

    Raises ConfigError naming file, key, value and remedy.
    """
    path = directory / "config.json"
    return parse_model_spec(read_json_object(path), str(path), _read_generation(directory))


def read_generation_defaults(directory: Path) -> GenerationDefaults:
    """The checkpoint's own sampling defaults; empty ones where it has no generation_config.json."""
    path = directory / "generation_config.json"
    return parse_generation_defaults(_read_generation(directory) or {}, str(path))


def find_model_directory(name_or_path: str, hub_cache: Path | None = None) -> Path:
    """A local directory, or the snapshot of a hub id (`owner/name`) already in the local cache.

    `hub_cache` defaults to Hugging Face's. Never downloads. Raises ConfigError if neither is there.
    """
    if not name_or_path:
        raise ConfigError("the model's name is empty; give a directory or a hub id")
    try:
        directory = Path(name_or_path).expanduser()
        if directory.is_dir():
            return directory
        is_file = directory.exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: ~user without a home
        raise ConfigError(
            f"model {reprlib.repr(name_or_path)} cannot be looked at "
            f"({getattr(error, 'strerror', None) or error}); give a "
            "directory that can be read, or a hub id"
        ) from error
    if is_file:
        raise ConfigError(
            f"model {name_or_path} is a file; give the directory that holds config.json"
        )
    cache = read_environment().hf_cache if hub_cache is None else hub_cache
    repository = cache / f"models--{name_or_path.replace('/', '--')}"
    snapshots = repository / "snapshots"
    reference = repository / "refs" / "main"
    if reference.is_file():
        pinned = snapshots / reference.read_text(encoding="utf-8").strip()
        if (pinned / "config.json").exists():
            return pinned
    complete = [path.parent for path in snapshots.glob("*/config.json")]
    if complete:
        return max(complete, key=lambda path: path.stat().st_mtime)
    raise ConfigError(
        f"model {name_or_path} is neither a directory nor in the hub cache {cache}; "
        f"download it first (hf download {name_or_path}) or give its path"
    )


def parse_model_spec(
    config: Mapping[str, Any], source: str, generation: Mapping[str, Any] | None = None
) -> ModelSpec:
    """The spec in a parsed config.json and, where given, generation_config.json.

    `source` names the file in errors. Raises ConfigError for an unsupported architecture, quantized
    weights or a value that cannot work.
    """
    keys = JsonKeys(config, source)
    architecture = _architecture(keys)
    family = _FAMILIES[architecture]
    _refuse_unsupported(keys)
    num_layers = keys.count("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise keys.error("num_hidden_layers", f"at most {MAX_LAYERS} layers can be built")
    hidden_size, num_heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    max_position = keys.count("max_position_embeddings", family.max_position)
    rope_theta, rope_scaling = parse_rope(keys, max_position)
    window, sliding_layers = _sliding(keys, family, num_layers)
    attention_bias = keys.flag("attention_bias", False)
    extra = JsonKeys(generation or {}, str(Path(source).with_name("generation_config.json")))
    vocab_size = keys.count("vocab_size")
    bos, eos = _special_ids(keys, extra, family, vocab_size)
    return ModelSpec(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=keys.count("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(keys, family, num_heads),
        head_dim=_head_dim(keys, family, hidden_size, num_heads),
        vocab_size=vocab_size,
        max_position=max_position,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        dtype=_dtype(keys),
        rope_scaling=rope_scaling,
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        out_bias=attention_bias if family.out_bias is None else family.out_bias,
        mlp_bias=keys.flag("mlp_bias", False) if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        sliding_window=window,
        sliding_layers=sliding_layers,
        bos_token_id=bos,
        eos_token_ids=eos,
    )


def _read_generation(directory: Path) -> dict[str, Any] | None:
    path = directory / "generation_config.json"
    return read_json_object(path) if path.exists() else None


def _architecture(keys: JsonKeys) -> str:
    """The first of `architectures`, or the one `model_type` stands for where there are none."""
    names, model_type = keys.raw("architectures"), keys.raw("model_type")
    supported = f"supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
    if names:
        first = names[0] if isinstance(names, list) else None
        if not isinstance(first, str) or first not in _FAMILIES:
            raise keys.error("architectures", supported)
        return first
    for name, family in _FAMILIES.items():
        if family.model_type == model_type:
            return name
    raise keys.error("architectures" if model_type is None else "model_type", supported)


def _refuse_unsupported(keys: JsonKeys) -> None:
    for key in ("quantization_config", "compression_config"):
        if key in keys:
            raise keys.error(
                key, "quantized checkpoints are not supported; use the original weights"
            )
    if keys.raw("hidden_act", "silu") not in ("silu", "swish"):
        raise keys.error("hidden_act", "only silu is supported")


def _num_kv_heads(keys: JsonKeys, family: _Family, num_heads: int) -> int:
    absent = family.num_kv_heads or num_heads
    num_kv_heads = keys.count("num_key_value_heads", absent, null=num_heads)
    if num_heads % num_kv_heads:
        raise keys.error(
            "num_key_value_heads",
            f"it is taken as {num_kv_heads}, which must divide num_attention_heads {num_heads}",
        )
    return num_kv_heads


def _head_dim(keys: JsonKeys, family: _Family, hidden_size: int, num_heads: int) -> int:
    head_dim = keys.optional_count("head_dim", family.head_dim)
    if head_dim is None:
        if hidden_size % num_heads:
            raise keys.error(
                "hidden_size",
                f"it must be a multiple of num_attention_heads {num_heads}, or give head_dim",
            )
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise keys.error(
            "head_dim", f"it is taken as {head_dim}; rotary embedding needs an even number"
        )
    return head_dim


def _dtype(keys: JsonKeys) -> DType:
    """`dtype` (transformers 5) or `torch_dtype` (4); float32 where neither says."""
    key = "dtype" if "dtype" in keys else "torch_dtype"
    value = keys.raw(key)
    if value is None:
        return DType.FLOAT32
    name = str(value).removeprefix("torch.")
    if name not in WEIGHT_DTYPES:
        raise keys.error(key, f"supported are {', '.join(WEIGHT_DTYPES)}")
    return DType(name)


def _sliding(
    keys: JsonKeys, family: _Family, num_layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    """(window, which layers slide); (None, ()) where none does."""
    kinds = _layer_types(keys, num_layers)
    window = None
    if family.slides == "all layers" or keys.flag("use_sliding_window", False):
        window = keys.optional_count("sliding_window", 4096)
    if family.slides == "some layers":
        first = keys.raw("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise keys.error("max_window_layers", "it must be a whole number of 0 or more")
        slides = kinds or tuple(window is not None and i >= first for i in range(num_layers))
    else:
        slides = (family.slides == "all layers" and window is not None,) * num_layers
        if kinds and kinds != slides:
            raise keys.error(
                "layer_types",
                f"each {family.model_type} layer is {'sliding' if slides[0] else 'full'}_attention "
                "here; remove the key or change sliding_window",
            )
    if any(slides) and window is None:
        raise keys.error("layer_types", "sliding layers need use_sliding_window and sliding_window")
    return (window, slides) if any(slides) else (None, ())


def _layer_types(keys: JsonKeys, num_layers: int) -> tuple[bool, ...]:
    kinds = keys.raw("layer_types")
    if kinds is None:
        return ()
    known = {"full_attention": False, "sliding_attention": True}
    if not isinstance(kinds, list | tuple) or any(str(kind) not in known for kind in kinds):
        raise keys.error("layer_types", f"supported entries are {', '.join(known)}")
    if len(kinds) != num_layers:
        raise keys.error("layer_types", f"it must have num_hidden_layers = {num_layers} entries")
    return tuple(known[kind] for kind in kinds)


def _special_ids(
    keys: JsonKeys, generation: JsonKeys, family: _Family, vocab_size: int
) -> tuple[int | None, tuple[int, ...]]:
    """(bos, eos list) of generation_config.json, else config.json, else the family's own."""
    absent_bos, absent_eos = family.special_ids
    bos = generation.token_ids("bos_token_id") or keys.token_ids("bos_token_id", absent_bos)
    found = generation.token_ids("eos_token_id")
    eos = found or keys.token_ids("eos_token_id", absent_eos)
    if max(eos, default=0) >= vocab_size:
        raise (generation if found else keys).error(
            "eos_token_id", f"vocab_size {vocab_size} allows ids of 0 to {vocab_size - 1}"
        )
    return bos[0] if bos else None, eos
