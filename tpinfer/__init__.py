"""Tensor-parallel LLM inference that knows where every microsecond goes."""
