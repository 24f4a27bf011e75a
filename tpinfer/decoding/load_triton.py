"""From a device to the kernel of greedy rows, or why it is not used there. Triton is imported here
only where it is tried."""

import torch

from tpinfer.decoding.vocab_passes import TorchPasses, VocabPasses


def load_triton_passes(device: torch.device) -> tuple[VocabPasses | None, str]:
    """(passes, where they come from), or (None, why not). Held against torch's first, to the
    bit."""
    try:
        import triton

        from tpinfer.decoding.triton_passes import TritonPasses
    except ImportError as error:
        return None, f"triton cannot be imported: {error}"
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(4))
    logits[1, 77], logits[2] = float("nan"), -0.0
    logits = logits.to(device)
    try:
        found = TritonPasses().best_keys(logits, range(3), 9)
        agrees = torch.equal(found, TorchPasses().best_keys(logits, range(3), 9))
    except Exception as failure:  # the compiler's own, the driver's, whatever ptxas says
        first = (str(failure).splitlines() or [type(failure).__name__])[0]
        return None, f"its kernel does not run here: {first[:160]}"
    if not agrees:
        return None, "its kernel gives other keys than torch here"
    return TritonPasses(), f"triton {triton.__version__}, held against torch's keys"
