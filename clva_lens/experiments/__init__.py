"""Asked once, kept for good: analyses and their records, the demo, the toys' cards, the bench.

Public: ``new_record`` and ``open_record``.
"""
