"""Paged KV cache and the attention that reads it."""
