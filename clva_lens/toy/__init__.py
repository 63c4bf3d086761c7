"""The embedded world and the models trained on it; public are ``scenes`` and ``questions``."""
