"""Hugging Face transformers on the same work as `tpinfer bench latency --batch-size 1`: the peer.

    python profiling/peers/transformers_decode.py shape:qwen3-0.6b --input-len 32 --output-len 24

Greedy, float32, all cores, key-value cache on. Prints the median time to first token and per output
token in ms over --num-iters runs, behind one that is not counted.
"""

import argparse
import statistics
import time
from importlib.metadata import version

from tpinfer.bench.workload import random_prompts
from tpinfer.cli.generate_flags import model_directory


def main() -> None:
    """Measure and print."""
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=24)
    parser.add_argument("--num-iters", type=int, default=3)
    args = parser.parse_args()
    directory = model_directory(args.model)
    if args.model.startswith("shape:"):
        config = transformers.AutoConfig.from_pretrained(directory)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    prompt = random_prompts(1, args.input_len, model.config.vocab_size, 0)
    first, later = [], []
    with torch.inference_mode():
        for run in range(args.num_iters + 1):
            began = time.perf_counter()
            out = model(torch.tensor(prompt), use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            reached = time.perf_counter()
            for _ in range(args.output_len - 1):
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            if run:
                first.append(reached - began)
                later.append((time.perf_counter() - reached) / (args.output_len - 1))
    print(
        f"transformers {version('transformers')}: time to first token "
        f"{statistics.median(first) * 1e3:.2f} ms, per output token "
        f"{statistics.median(later) * 1e3:.3f} ms"
    )


if __name__ == "__main__":
    main()
