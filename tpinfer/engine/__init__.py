"""Requests in, tokens out, and where the time went."""
