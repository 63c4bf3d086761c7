"""What a user holds in the hand: load a model, look, act, answer, judge.

Public: what ``cl.`` has of it, each in the file of its name; ``load`` and ``trace`` come first.
"""
