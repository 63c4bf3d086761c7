"""Tensors in, tensors out: Eqs. 1 to 11 of the paper, moments of maps and the pointing game.

Public: ``classify_heads``, ``attention_drift``, ``HeadClasses`` and ``VisualAnchors``.
"""
