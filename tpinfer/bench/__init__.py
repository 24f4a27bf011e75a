"""Workloads, and what running them showed."""
