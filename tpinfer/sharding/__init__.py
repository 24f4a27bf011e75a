"""Which part of each tensor a rank holds."""
