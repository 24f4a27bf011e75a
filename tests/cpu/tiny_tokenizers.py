"""Small tokenizers of the kinds checkpoints carry, made here with the `tokenizers` library."""

import json
from pathlib import Path
from typing import Any

CORPUS = (
    "Once upon a time there was a small fox who lived in the old wood.",
    "The fox and the owl said: hello, there! It's 3 o'clock.",
    "日本語 café naïve 😀 once upon a time",
)
SPECIALS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
"""Ids 0 to 6; 1 and 2 are what `tiny_models` calls beginning and end."""
CHAT_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('no such role: ' + message.role) }}
    {%- endif %}
    {{- '<|' + message.role + '|>\\n' + message.content | trim + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""
"""Blocks are trimmed as transformers does it, or the line ends would show."""


def byte_level(directory: Path, vocab_size: int = 331, **settings: Any) -> Path:
    """GPT-2's and Llama 3's kind: byte-pair encoding over bytes, without a post-processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return _write(directory, json.loads(tokenizer.to_str()), settings)


def byte_fallback(directory: Path, **settings: Any) -> Path:
    """Llama 2's kind, as converted from sentencepiece: spaces are U+2581, one stands in front, and
    a character outside the vocabulary becomes one token a byte. Puts `<s>` in front itself.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*SPECIALS, *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS[:2] * 4, trainer)
    content = json.loads(tokenizer.to_str())
    # The trainer can only take bytes in as special tokens; in such files they are ordinary ones.
    content["added_tokens"] = content["added_tokens"][: len(SPECIALS)]
    return _write(directory, content, settings)


def _write(directory: Path, content: dict[str, Any], settings: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": False},
        "clean_up_tokenization_spaces": False,
    } | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return directory
