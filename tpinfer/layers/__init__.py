"""The ops of a decoder, bound to their weights."""
