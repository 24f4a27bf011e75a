"""From logits to tokens. Every rank runs it on the same numbers and so picks the same tokens.

Random numbers are keyed by (seed, continuation, position), never by step or row: a result does
not depend on what else was in the batch.
"""

import torch

from tpinfer.layers.step_inputs import NO_TOKEN, Activations, OpCall, SamplingRow, StepInputs

_MASK = (1 << 64) - 1


def uniform(seed: int, index: int, position: int, purpose: int = 0) -> float:
    """A number in (0, 1) that depends on its arguments alone (SplitMix64 finaliser, applied per
    key)."""
    state = 0x9E3779B97F4A7C15
    for key in (seed, index, position, purpose):
        state = (state + (key & _MASK) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return ((state >> 11) + 0.5) / (1 << 53)


def pick(logits_V: torch.Tensor, row: SamplingRow) -> int:
    """One token from float32 [V].

    Temperature first, then top-k, top-p (the smallest set of likeliest tokens whose mass reaches
    it) and min-p (at least that share of the likeliest token's probability); the draw inverts
    the distribution function of what is left, in order of falling probability, summed in
    float64. NO_TOKEN where the logits are not numbers.
    """
    if row.temperature == 0:
        top, token = logits_V.max(0)
        return NO_TOKEN if top.isnan() else int(token)
    scaled = logits_V.double() / row.temperature
    if row.top_k and row.top_k < scaled.shape[0]:
        kept, ids = torch.topk(scaled, row.top_k, sorted=True)
    elif row.top_p < 1 or row.min_p > 0:
        kept, ids = torch.sort(scaled, descending=True, stable=True)
    else:
        kept, ids = scaled, None
    mass = torch.softmax(kept, -1)
    if ids is not None:
        mass = mass[: _num_kept(mass, row)]
    steps = mass.cumsum(0)
    if steps[-1].isnan():
        return NO_TOKEN
    draw = uniform(row.seed, row.index, row.position) * float(steps[-1])
    place = int(torch.searchsorted(steps, draw, right=True).clamp_(max=steps.shape[0] - 1))
    return place if ids is None else int(ids[place])


def _num_kept(mass: torch.Tensor, row: SamplingRow) -> int:
    """How many of the falling probabilities survive top-p and min-p; at least one."""
    num_kept = mass.shape[0]
    if row.top_p < 1:
        before = mass.cumsum(0) - mass
        num_kept = int((before < row.top_p).sum())
    if row.min_p > 0:
        num_kept = min(num_kept, int((mass >= row.min_p * mass[0]).sum()))
    return max(num_kept, 1)


def bind_sample() -> OpCall:
    """tokens = one token per logit row, int64 [R]."""

    def sample(acts: Activations, step: StepInputs) -> None:
        if acts.best is not None:
            acts.tokens = acts.best
        elif step.all_greedy:
            top, tokens = acts.logits.max(-1)
            acts.tokens = tokens.masked_fill_(top.isnan(), NO_TOKEN)
        else:
            picked = [pick(acts.logits[i], row) for i, row in enumerate(step.sampling)]
            acts.tokens = torch.tensor(picked, dtype=torch.int64, device=acts.logits.device)

    return sample
