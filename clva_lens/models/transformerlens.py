"""What is imported of TransformerLens, and only when it is needed: its import takes seconds."""

import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple


class TransformerLens(NamedTuple):
    """What is used of TransformerLens."""

    cache: Any
    bridge: Any
    build: Callable[..., Any]
    detect_bos_eos: Callable[[Any], tuple[bool, bool]]
    editable: tuple[type, ...]
    adapters: frozenset[str]
    multimodal: frozenset[str]


def transformer_lens() -> TransformerLens:
    """Import TransformerLens; what its import does to warnings and logging is undone."""
    logger = logging.getLogger("transformers")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import ActivationCache
        from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.generalized_components import (
            PositionEmbeddingsAttentionBridge,
        )
        from transformer_lens.model_bridge.sources import (
            build_bridge_from_module,
            detect_tokenizer_bos_eos,
        )
        from transformer_lens.utilities.architectures import MULTIMODAL_ARCHITECTURES
    logger.setLevel(level)
    return TransformerLens(
        ActivationCache,
        TransformerBridge,
        build_bridge_from_module,
        detect_tokenizer_bos_eos,
        (PositionEmbeddingsAttentionBridge,),
        frozenset(SUPPORTED_ARCHITECTURES),
        frozenset(MULTIMODAL_ARCHITECTURES),
    )
