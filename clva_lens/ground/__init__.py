"""What every room stands on: errors, named axes, registries, settings, progress bars.

Public: the errors (``clva_lens.ground.errors``) and ``TokenSpans``.
"""
