"""The models: facts about families, not algorithms."""
