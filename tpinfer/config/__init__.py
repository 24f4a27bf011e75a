"""Frozen records of what a user asked for and what a checkpoint or machine is."""
