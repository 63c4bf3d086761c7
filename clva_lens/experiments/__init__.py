"""Experiments: what was run, kept once and for all, and shown again from what was kept."""
