"""Shape of a dense decoder, free of any checkpoint's key names. `config.huggingface` fills it
from config.json."""

from dataclasses import dataclass

from tpinfer.config.dtypes import DType


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context."""

    kind: str = "default"
    """`default` (none), `linear`, `llama3` or `yarn`."""
    factor: float = 1.0
    """Context stretch."""
    original_max_position: int = 0
    """Positions the model was first trained on; 0 where the kind needs none."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original/low are fully stretched."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original/high stay as they are."""
    beta_fast: float = 32.0
    """yarn: rotations above which a dim is not stretched."""
    beta_slow: float = 1.0
    """yarn: rotations below which a dim is fully stretched."""
    attention_factor: float | None = None
    """yarn: factor on cos and sin; None computes 0.1*ln(factor)+1 (or the mscale quotient)."""
    mscale: float = 0.0
    """yarn: numerator of the attention factor's quotient; 0 where absent."""
    mscale_all_dim: float = 0.0
    """yarn: denominator of the attention factor's quotient; 0 where absent."""
    truncate: bool = True
    """yarn: round the correction range to whole dims."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder-only transformer: RMSNorm, rotary attention with grouped KV heads, gated SiLU
    MLP."""

    architecture: str
    """The checkpoint's own name for it, such as `Qwen3ForCausalLM`."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    """Largest context the checkpoint claims, in tokens."""
    rms_norm_eps: float
    rope_theta: float
    dtype: DType
    """Dtype the checkpoint says its weights have."""
    rope_scaling: RopeScaling = RopeScaling()
    tie_embeddings: bool = False
    """The head reuses the embedding's weight."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys before the rotation (Qwen3)."""
    sliding_window: int | None = None
    """Tokens a sliding layer attends to, itself included; None where no layer slides."""
    sliding_layers: tuple[bool, ...] = ()
    """Per layer, whether it slides; empty where none does."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a sequence, from generation_config.json where it has them, else
    config.json."""

    def window(self, layer: int) -> int | None:
        """Sliding window of `layer` in tokens, None for full attention."""
        return self.sliding_window if self.sliding_layers and self.sliding_layers[layer] else None
