"""Rebuild the embedded models from nothing: text, tokenizer, training, export. Needs torch and
transformers.

    python embedded/build.py --out tpinfer/embedded [--only story|story-draft] [--steps N]
    [--threads N]

Seeded and counted in steps, so that the same versions on the same processor give the same models.
"""

import argparse
import json
import time
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

import corpus
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
VOCAB_SIZE = 2048
CONTEXT = 1024
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('roles are system, user and assistant') }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Shape and training of one model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    steps: int
    peak_rate: float


RECIPES = {
    "story": Recipe(192, 6, 6, 3, 512, 2000, 3e-3),
    "story-draft": Recipe(96, 3, 3, 3, 256, 1600, 5e-3),
}
BATCH, LENGTH, WARMUP = 12, 208, 100
IGNORED = -100
"""Label of padding: no loss."""
NUM_DRILLS, DRILL_SHARE = 4, 0.4
"""Drills in a batch, and the share of the steps, from the first, that have them."""


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over the stories: any Unicode text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((render(d) for d in corpus.documents(11, 20000)), trainer)
    return tokenizer


def render(document: str | list[tuple[str, str]]) -> str:
    """A document as training text; a chat in the chat template's form."""
    if isinstance(document, str):
        return document + SPECIAL[0]
    turns = (f"<|user|>{asked}<|end|><|assistant|>{answer}<|end|>" for asked, answer in document)
    return "".join(turns) + SPECIAL[0]


def token_rows(tokenizer: Tokenizer, num_rows: int, seed: int) -> torch.Tensor:
    """int64 [num_rows, LENGTH]: one document a row from its first token, cut or padded with
    IGNORED.

    A row never holds two stories, so whom a sentence speaks of is always to be found in the row.
    """
    rows = torch.full((num_rows, LENGTH), IGNORED)
    texts = (render(document) for document in corpus.documents(seed, num_rows))
    for row, encoded in zip(rows, tokenizer.encode_batch(list(texts)), strict=True):
        ids = torch.tensor(encoded.ids[:LENGTH])
        row[: len(ids)] = ids
    return rows


def drill_rows(tokenizer: Tokenizer, num_rows: int) -> torch.Tensor:
    """int64 [num_rows, LENGTH]: rows that only looking back can predict, before stories ask for it.

    Half hold a few names in random order, over and over; half a random stretch of tokens, repeated.
    A model learns from them in some hundred steps to copy from its context; from stories alone it
    takes thousands.
    """
    generator = torch.Generator().manual_seed(7)
    names, vocab_size = name_tokens(tokenizer), tokenizer.get_vocab_size()
    rows = torch.empty(num_rows, LENGTH, dtype=torch.int64)
    for i in range(num_rows):
        if i % 2:
            chosen = names[torch.randperm(len(names), generator=generator)[:3]]
            rows[i] = chosen[torch.randint(0, 3, (LENGTH,), generator=generator)]
        else:
            period = int(torch.randint(12, 64, (1,), generator=generator))
            stretch = torch.randint(len(SPECIAL), vocab_size, (period,), generator=generator)
            rows[i] = stretch.repeat(LENGTH // period + 1)[:LENGTH]
    return rows


def make_config(recipe: Recipe, vocab_size: int) -> transformers.LlamaConfig:
    """A Llama with grouped KV heads and a tied head."""
    return transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=[0, 4],
        pad_token_id=0,
        attention_dropout=0.0,
    )


def train(recipe: Recipe, tokenizer: Tokenizer, name: str, out: Path, steps: int) -> None:
    """Train with AdamW and a cosine rate; exports every 400 steps so that a model is always
    there."""
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(make_config(recipe, tokenizer.get_vocab_size())).float()
    optimizers = make_optimizers(model, recipe)
    rows = token_rows(tokenizer, steps * BATCH, seed=100).view(steps, BATCH, LENGTH)
    drilled = rows[: int(steps * DRILL_SHARE), :NUM_DRILLS]
    drilled.copy_(drill_rows(tokenizer, drilled.shape[0] * NUM_DRILLS).view(drilled.shape))
    unseen = token_rows(tokenizer, 48, seed=99)
    names = name_tokens(tokenizer)
    began, smoothed = time.time(), 0.0
    for step in range(steps):
        ramp = min(1.0, (step + 1) / WARMUP)
        fall = 0.02 + 0.49 * (1 + cos(pi * step / steps))
        loss = model(input_ids=rows[step].clamp_min(0), labels=rows[step]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * ramp * fall
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smoothed = loss.item() if step == 0 else 0.98 * smoothed + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            print(
                f"{name} {step + 1}/{steps} loss {smoothed:.3f} names kept "
                f"{names_kept(model, unseen, names):.3f} {time.time() - began:.0f} s",
                flush=True,
            )
        if (step + 1) % 400 == 0 or step + 1 == steps:
            export(model, tokenizer, out / name)


def make_optimizers(
    model: transformers.LlamaForCausalLM, recipe: Recipe
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the layers' matrices (it learns to copy names in a third of AdamW's steps), AdamW
    for the rest. Each group carries its peak rate."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    outer = [p for n, p in model.named_parameters() if p.ndim != 2 or ".layers." not in n]
    muon = torch.optim.Muon(
        inner, lr=recipe.peak_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(outer, lr=recipe.peak_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = recipe.peak_rate
    return muon, adam


def name_tokens(tokenizer: Tokenizer) -> torch.Tensor:
    """int64: ids of the names, as they stand behind a space."""
    everybody = corpus.NAMES["she"] + corpus.NAMES["he"]
    found = [tokenizer.encode(f" {name}").ids for name in everybody]
    return torch.tensor([ids[0] for ids in found if len(ids) == 1])


@torch.inference_mode()
def names_kept(
    model: transformers.LlamaForCausalLM, rows: torch.Tensor, names: torch.Tensor
) -> float:
    """How often a name that its story has mentioned before is predicted where it comes again."""
    guesses = model(input_ids=rows.clamp_min(0)).logits[:, :-1].argmax(-1)
    right = total = 0
    for row, guess in zip(rows, guesses, strict=True):
        for place in torch.isin(row, names).nonzero()[:, 0].tolist():
            if place and row[place] in row[:place]:
                total += 1
                right += int(guess[place - 1] == row[place])
    return right / max(total, 1)


def export(model: transformers.LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write a Hugging Face directory with float16 weights."""
    directory.mkdir(parents=True, exist_ok=True)
    half = transformers.LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[0],
            "eos_token": SPECIAL[0],
            "pad_token": SPECIAL[0],
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
        },
    )
    write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": 0,
            "eos_token_id": [0, 4],
            "pad_token_id": 0,
            "do_sample": True,
            "temperature": 0.8,
            "top_p": 0.95,
        },
    )


def write_json(path: Path, value: object) -> None:
    """Pretty JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=list(RECIPES))
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer()
    for name, recipe in RECIPES.items():
        if args.only in (None, name):
            train(recipe, tokenizer, name, args.out, args.steps or recipe.steps)


if __name__ == "__main__":
    main()
