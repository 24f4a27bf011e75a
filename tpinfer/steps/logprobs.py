"""What is reported of one token's probability. Made on the ranks, read by rank 0."""

import msgspec


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities in nats under the model's own distribution: before penalties, masks,
    biases and temperature."""

    token_id: int
    """The token that was drawn, or that stands in the prompt."""
    logprob: float
    top_token_ids: tuple[int, ...] = ()
    """Likeliest tokens, falling; equal ones by rising id."""
    top_logprobs: tuple[float, ...] = ()
