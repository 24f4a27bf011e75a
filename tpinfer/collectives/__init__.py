"""Reductions and exchanges between ranks."""
