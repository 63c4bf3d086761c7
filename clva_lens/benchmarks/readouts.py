"""Where a yes or a no is read: in the text of the answer, or in the logits of its first token.

======================  ==========================================================================
text                    what the parser makes of the words; the rule of the official scripts
first token             the larger logit of all spellings of yes or no that are one token, found
                        by tokenizer and template (``lens.margins``); a tie is a no
first two-token         the tokens "yes" and "no" as they stand within a word. Some scripts read
(legacy)                these, which LLaVA-1.5 never begins an answer with: pope-audit 0.1.1 found
                        them in none of 9,000 answers, and F1 on POPE's adversarial split at .7608
                        in place of .8221
======================  ==========================================================================
"""

from collections.abc import Mapping
from typing import Any

from clva_lens.benchmarks.base import Answer
from clva_lens.ground.errors import BenchmarkError

TEXT, FIRST, LEGACY = "text", "first token", "first two-token (legacy)"
READOUTS = (TEXT, FIRST, LEGACY)


def read_margin(answer: Answer) -> str:
    """Return "yes" where the margin is above 0, else "no".

    Raises:
        BenchmarkError: if the answer has no margin, as files of texts have none.
    """
    if answer.margin is None:
        raise BenchmarkError(
            f"the answer to {answer.id} has no margin, so nothing can be read from its first "
            "token. Score it with readout='text', or run the model with out='…'."
        )
    return "yes" if answer.margin > 0 else "no"


def require_margins_for(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Raise unless the margins of a run with the settings ``then`` serve those of ``now``.

    Raises:
        BenchmarkError: if one is of the two legacy tokens and the other of all spellings.
    """
    asked, recorded = (settings.get("readout", TEXT) for settings in (now, then))
    if asked != TEXT and (asked == LEGACY) != (recorded == LEGACY):
        raise BenchmarkError(
            f"the run's margins were recorded for readout='{recorded}', and readout='{asked}' "
            "reads other tokens. Run the model with that setting, into another folder."
        )
