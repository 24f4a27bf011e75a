"""Kernel names by engine, as TOML."""
