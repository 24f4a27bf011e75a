"""Random-weight checkpoints of each supported family, written by transformers: small,
odd-shaped, seeded."""

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-tied-gqa": {
        "kind": "Llama",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "llama-nine-heads": {
        "kind": "Llama",
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "hidden_size": 72,
    },
    "llama-mqa-bias": {
        "kind": "Llama",
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-llama3-rope": {
        "kind": "Llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama-yarn-rope": {
        "kind": "Llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-linear-rope": {
        "kind": "Llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
    "mistral-window": {
        "kind": "Mistral",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "sliding_window": 20,
    },
    "qwen2-bias": {
        "kind": "Qwen2",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "hidden_size": 96,
        "tie_word_embeddings": True,
    },
    "qwen2-some-layers-slide": {
        "kind": "Qwen2",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "qwen3-norms": {
        "kind": "Qwen3",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "qwen3-untied": {
        "kind": "Qwen3",
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 16,
        "hidden_size": 80,
    },
}
"""Name -> config of transformers' class `{kind}Config`."""


def write_checkpoint(name: str, directory: Path, seed: int = 0) -> Path:
    """Write the checkpoint `name` into `directory` in float32 and return it.

    Weights are larger than a fresh model's so that greedy choices are far apart.
    """
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    shape = dict(SHAPES[name])
    kind = shape.pop("kind")
    settings = {
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "vocab_size": 331,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    } | shape
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in parameter_name:
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    return directory


def greedy_oracle(directory: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """transformers' greedy continuation of each prompt in float32, ignoring end tokens."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    outputs = []
    with torch.inference_mode():
        for prompt in prompts:
            tokens = list(prompt)
            past, feed = None, torch.tensor([tokens])
            for _ in range(max_tokens):
                result = model(feed, past_key_values=past, use_cache=True)
                past = result.past_key_values
                tokens.append(int(result.logits[0, -1].argmax()))
                feed = torch.tensor([[tokens[-1]]])
            outputs.append(tokens[len(prompt) :])
    return outputs
