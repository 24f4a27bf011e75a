"""The compiled decoder that stands beside ours on a GPU does the work of a Llama: its tokens are
those of transformers with the same weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peers.gpu_decode import PlainDecoder

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 96, "rms_norm_eps": 1e-5, "num_hidden_layers": 3, "vocab_size": 300,
    "rope_theta": 500000.0, "head_dim": 8, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_its_tokens_are_those_of_transformers() -> None:
    import transformers

    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**CONFIG), attn_implementation="eager"
    ).eval()
    mine = PlainDecoder(CONFIG, 2, 24, torch.device("cpu"))
    with torch.inference_mode():
        for name in ("embed", "head", "norm", "cos", "sin", "cache"):
            setattr(mine, name, getattr(mine, name).float())
        mine.embed, mine.head = theirs.model.embed_tokens.weight, theirs.lm_head.weight
        for layer, block in enumerate(theirs.model.layers):
            attn, mlp = block.self_attn, block.mlp
            parts = attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight
            mine.qkv[layer], mine.out[layer] = torch.cat(parts), attn.o_proj.weight
            mine.gate_up[layer] = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
            mine.down[layer] = mlp.down_proj.weight
        token = torch.tensor([[5], [71]])
        seen = token
        for place in range(20):
            token = mine(token, torch.tensor([place]))
            expected = theirs(seen).logits[:, -1:].argmax(-1)
            assert torch.equal(token, expected), place
            seen = torch.cat((seen, token), 1)


def test_it_runs_and_a_peer_that_fails_costs_itself_alone(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    program = (
        "import sys; from peers import gpu_decode as peer; peer.NUM_STEPS, peer.NUM_SKIPPED = 3, 1;"
        "peer.torch.compile = lambda model, **_: model; sys.modules['transformers'] = None;"
        "sys.exit(peer.main())"
    )
    command = [sys.executable, "-c", program, "--shape", "qwen3-0.6b-slice", "--layers", "1"]
    command += ["--context", "12", "--batch", "1,2", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT / "profiling"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["compiled batch 1"]["step_ms"] > 0
    assert found["compiled batch 2"]["tokens_per_s"] > 0
    assert "transformers" in found["transformers batch 1"]["error"]
