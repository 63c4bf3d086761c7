"""The embedded default: a procedural world and the models trained on it."""
