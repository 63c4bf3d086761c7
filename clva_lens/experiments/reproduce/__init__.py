"""The paper's tables and figures again, from one command: one file each, listed by ``ITEMS``."""
