"""Decoders as flat programs."""
