"""Beam search by the length with the prompt, against the searches of the transformers it is from.

No part of the suite: it wants the file ``transformers/generation/beam_search.py`` of 4.29.2 or
4.31.0, from a clone, a folder or a wheel (``pip download --no-deps transformers==4.29.2``), and
reads nothing else of it:

    python tests/parity/beam_length.py transformers-4.29.2-py3-none-any.whl [more ...]

The same language model, a table of random logits for each sequence, is searched by the old scorer
and by ``methods/beams.py``, under both rules. Counted are prompts with equal answers.
"""

import sys
import types
import zipfile
from functools import cache
from pathlib import Path

import torch
from transformers import GenerationConfig

from clva_lens.lens.beam_length import PromptCounted
from clva_lens.methods.beams import Beams

INSIDE = "transformers/generation/beam_search.py"
VOCABULARY, END, STEPS, BEAMS, PROMPTS = 24, 1, 16, 5, 200


def old_scorer(path: Path):
    """Return the class BeamSearchScorer of an old transformers, without the rest of it."""
    if path.is_dir():
        found = next(one for one in (path / INSIDE, path / "src" / INSIDE) if one.is_file())
        source = found.read_text(encoding="utf-8")
    else:
        with zipfile.ZipFile(path) as wheel:
            source = wheel.read(INSIDE).decode()
    source = source.replace("from ..utils import add_start_docstrings", "")
    source = source.replace("from .beam_constraints import", "from beam_constraints import")
    stub = types.ModuleType("beam_constraints")
    for name in ("Constraint", "ConstraintListState"):
        setattr(stub, name, object)
    sys.modules["beam_constraints"] = stub
    module = types.ModuleType("old_beam_search")
    vars(module)["add_start_docstrings"] = lambda *_: lambda function: function
    exec(compile(source, str(path), "exec"), vars(module))
    return module.BeamSearchScorer


@cache
def log_probs(seed: int, answer: tuple[int, ...]) -> torch.Tensor:
    """The language model: what follows a sequence; ends become likelier with its length."""
    drawn = torch.Generator().manual_seed(hash((seed, answer)) % 2**31)
    logits = 2.0 * torch.randn(VOCABULARY, generator=drawn)
    logits[END] += 0.25 * len(answer)
    return logits.log_softmax(dim=0)


def rows(seed: int, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    return torch.stack([log_probs(seed, tuple(row[prompt:].tolist())) for row in ids])


def searched_as_then(scorer_of, seed: int, prompt: int) -> list[int]:
    """The loop of the old ``beam_search``, around its scorer."""
    scorer = scorer_of(batch_size=1, num_beams=BEAMS, device=torch.device("cpu"))
    ids = torch.full((BEAMS, prompt), 2)
    scores = torch.full((BEAMS,), -1e9)
    scores[0] = 0
    while True:
        total = (rows(seed, ids, prompt) + scores[:, None]).view(1, -1)
        best, where = total.topk(2 * BEAMS, dim=1)
        chosen = scorer.process(
            ids,
            best,
            where % VOCABULARY,
            torch.div(where, VOCABULARY, rounding_mode="floor"),
            pad_token_id=0,
            eos_token_id=END,
        )
        scores, tokens = chosen["next_beam_scores"], chosen["next_beam_tokens"]
        ids = torch.cat([ids[chosen["next_beam_indices"]], tokens[:, None]], dim=1)
        if scorer.is_done or ids.shape[1] == prompt + STEPS:
            break
    out = scorer.finalize(
        ids,
        scores,
        tokens,
        chosen["next_beam_indices"],
        max_length=prompt + STEPS,
        pad_token_id=0,
        eos_token_id=END,
    )
    return until_end(out["sequences"][0, prompt:].tolist())


def searched_now(seed: int, prompt: int, penalty: float) -> list[int]:
    config = GenerationConfig(
        num_beams=BEAMS, eos_token_id=END, pad_token_id=0, max_length=prompt + STEPS
    )
    config.length_penalty = penalty
    beams = Beams.start(torch.full((BEAMS, prompt), 2))

    def stops(ids: torch.Tensor) -> torch.Tensor:
        return (ids[:, -1] == END) | (ids.shape[1] >= prompt + STEPS)

    while not beams.over:
        beams = beams.advance(rows(seed, beams.ids, prompt), config, stops).beams
    return until_end(beams.answers(1, 0)[0][0, prompt:].tolist())


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END)] if END in ids else ids


def main(paths: list[str]) -> None:
    """Print how many answers are equal, and how long they are, for each release and rule."""
    for path in paths:
        scorer_of = old_scorer(Path(path))
        for prompt in (12, 60, 600):
            then = [searched_as_then(scorer_of, seed, prompt) for seed in range(PROMPTS)]
            said = [f"{sum(map(len, then)) / PROMPTS:.2f} tokens there"]
            for name, penalty in (("generated", 1.0), ("with prompt", PromptCounted(prompt))):
                now = [searched_now(seed, prompt, penalty) for seed in range(PROMPTS)]
                equal = sum(one == other for one, other in zip(then, now, strict=True))
                mean = sum(map(len, now)) / PROMPTS
                said.append(f"{name}: {equal} of {PROMPTS} equal, {mean:.2f} tokens")
            print(f"{Path(path).name}, prompts of {prompt}: {'; '.join(said)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
