"""What other ways of decoding take on a GPU, beside which `profiling/gpu/engine.py` is read: the
same shape, random bfloat16 weights made on the device, batch 1 and more, each with 1,024 tokens of
context.

    python profiling/peers/gpu_decode.py [--shape llama-3.1-8b] [--batch 1,32] [--context 1024]
    [--layers N] [--only transformers,compiled] [--device cuda] [--out FILE]

`transformers`: its own model with a static cache, decode compiled by torch as its documentation
recommends (mode "reduce-overhead": CUDA graphs). `compiled`: a plain decoder of some forty lines
with a static cache, compiled whole with CUDA graphs, the way of gpt-fast
(https://pytorch.org/blog/accelerating-generative-ai-2). Times are of one step by device events,
median of the steps; greedy, the sampled token is fed back. Prints one JSON object behind RESULT,
and writes it after each peer where `--out` says so.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

SHAPES = Path(__file__).resolve().parents[2] / "tpinfer" / "embedded" / "shapes"
NUM_STEPS, NUM_SKIPPED = 40, 8


def main() -> int:
    """Each peer at each batch; a failure costs only itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--only", default="transformers,compiled")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = json.loads((SHAPES / args.shape / "config.json").read_text())
    if args.layers:
        config["num_hidden_layers"] = args.layers
    peers = {"transformers": transformers_steps, "compiled": compiled_steps}
    found: dict[str, Any] = {"command": sys.argv, "torch": torch.__version__, "config": config}
    for name in args.only.split(","):
        for batch in map(int, args.batch.split(",")):
            began = time.perf_counter()
            try:
                result = peers[name](config, batch, args.context, torch.device(args.device))
            except Exception:
                result = {"error": traceback.format_exc()[-1500:]}
            result["seconds_in_all"] = round(time.perf_counter() - began, 1)
            found[f"{name} batch {batch}"] = result
            print(f"{name} batch {batch}: {json.dumps(result)[:400]}", flush=True)
            if args.out:
                args.out.write_text(json.dumps(found, indent=1) + "\n")
            torch._dynamo.reset()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print("RESULT " + json.dumps(found))
    return 0


def step_times_ms(step: Callable[[], object], device: torch.device) -> list[float]:
    """Time of each step; the first ones, which compile and record graphs, are left out."""
    times: list[float] = []
    for number in range(NUM_SKIPPED + NUM_STEPS):
        began = time.perf_counter()
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            stop.record()
            stop.synchronize()
            spent = start.elapsed_time(stop)
        else:
            step()
            spent = (time.perf_counter() - began) * 1e3
        if number >= NUM_SKIPPED:
            times.append(spent)
    return times


def figures(times_ms: list[float], batch: int) -> dict[str, Any]:
    """Median and spread."""
    ordered = sorted(times_ms)
    median = ordered[len(ordered) // 2]
    return {
        "step_ms": median,
        "fastest_ms": ordered[0],
        "slowest_ms": ordered[-1],
        "tokens_per_s": batch / median * 1e3,
    }


@torch.inference_mode()
def transformers_steps(
    config: dict[str, Any], batch: int, context: int, device: torch.device
) -> dict[str, Any]:
    """transformers' model with a static cache."""
    import transformers

    made = transformers.AutoConfig.for_model(**config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(
                made, attn_implementation="sdpa", dtype=torch.bfloat16
            ).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    length = context + NUM_STEPS + NUM_SKIPPED + 8
    cache = transformers.StaticCache(config=made, max_cache_len=length)
    prompt = torch.randint(1000, (batch, context), device=device)
    places = torch.arange(context, device=device)
    model(prompt, past_key_values=cache, cache_position=places, logits_to_keep=1)
    decode = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    token = torch.ones(batch, 1, dtype=torch.int64, device=device)
    place = torch.tensor([context], device=device)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        out = decode(token, past_key_values=cache, cache_position=place)
        token.copy_(out.logits[:, -1:].argmax(-1))
        place.add_(1)

    return figures(step_times_ms(step, device), batch) | {"version": transformers.__version__}


class PlainDecoder(torch.nn.Module):
    """Llama's layers, written for a compiler: fused weights, a static cache, nothing else."""

    def __init__(
        self, config: dict[str, Any], batch: int, length: int, device: torch.device
    ) -> None:
        super().__init__()
        self.width, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.kv_heads, self.mlp = config["num_key_value_heads"], config["intermediate_size"]
        self.head_dim = config.get("head_dim") or self.width // self.heads
        self.eps, self.num_layers = config["rms_norm_eps"], config["num_hidden_layers"]
        outputs = (self.heads + 2 * self.kv_heads) * self.head_dim

        def weight(rows: int, columns: int) -> torch.Tensor:
            made = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
            return made.uniform_(-0.03, 0.03)

        self.embed = weight(config["vocab_size"], self.width)
        self.head = weight(config["vocab_size"], self.width)
        self.qkv = [weight(outputs, self.width) for _ in range(self.num_layers)]
        self.out = [weight(self.width, self.heads * self.head_dim) for _ in range(self.num_layers)]
        self.gate_up = [weight(2 * self.mlp, self.width) for _ in range(self.num_layers)]
        self.down = [weight(self.width, self.mlp) for _ in range(self.num_layers)]
        self.norm = torch.ones(self.width, dtype=torch.bfloat16, device=device)
        shape = self.num_layers, 2, batch, self.kv_heads, length, self.head_dim
        self.cache = torch.zeros(shape, dtype=torch.bfloat16, device=device).uniform_(-1, 1)
        angles = torch.outer(
            torch.arange(length, device=device).float(),
            1 / 500000 ** (torch.arange(0, self.head_dim, 2, device=device) / self.head_dim),
        )
        self.cos = torch.cat((angles, angles), -1).cos().bfloat16()
        self.sin = torch.cat((angles, angles), -1).sin().bfloat16()
        self.places = torch.arange(length, device=device)

    def forward(self, token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """The next token of each sequence: int64 [B, 1], [1] -> [B, 1]."""
        stream = F.embedding(token, self.embed)
        mask = (self.places <= place)[None, None, None, :]
        cos, sin = self.cos[place], self.sin[place]
        for layer in range(self.num_layers):
            stream = stream + self._attention(self._normed(stream), layer, place, mask, cos, sin)
            gate, up = F.linear(self._normed(stream), self.gate_up[layer]).chunk(2, -1)
            stream = stream + F.linear(F.silu(gate) * up, self.down[layer])
        return F.linear(self._normed(stream), self.head).argmax(-1)

    def _normed(self, stream: torch.Tensor) -> torch.Tensor:
        wide = stream.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(stream.dtype) * self.norm

    def _attention(
        self, hidden: torch.Tensor, layer: int, place: torch.Tensor, mask: torch.Tensor,
        cos: torch.Tensor, sin: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        heads, kv_heads, dim = self.heads, self.kv_heads, self.head_dim
        mixed = F.linear(hidden, self.qkv[layer]).unflatten(-1, (heads + 2 * kv_heads, dim))
        mixed = mixed.transpose(1, 2)  # [B, heads, 1, D]
        turned, value = mixed[:, : heads + kv_heads], mixed[:, heads + kv_heads :]
        low, high = turned.chunk(2, -1)
        turned = turned * cos + torch.cat((-high, low), -1) * sin
        keys, values = self.cache[layer, 0], self.cache[layer, 1]
        keys.index_copy_(2, place, turned[:, heads:])
        values.index_copy_(2, place, value)
        found = F.scaled_dot_product_attention(
            turned[:, :heads], keys, values, attn_mask=mask, enable_gqa=True
        )
        return F.linear(found.transpose(1, 2).flatten(2), self.out[layer])


@torch.inference_mode()
def compiled_steps(
    config: dict[str, Any], batch: int, context: int, device: torch.device
) -> dict[str, Any]:
    """A plain decoder, compiled whole."""
    model = PlainDecoder(config, batch, context + NUM_STEPS + NUM_SKIPPED + 8, device)
    decode = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    token = torch.ones(batch, 1, dtype=torch.int64, device=device)
    place = torch.tensor([context], device=device)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        token.copy_(decode(token, place))
        place.add_(1)

    return figures(step_times_ms(step, device), batch)


if __name__ == "__main__":
    sys.exit(main())
