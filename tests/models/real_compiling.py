"""Whether compiled answers are eager ones in every family: a script, since each compiles a graph.

    PYTHONPATH=. python tests/models/real_compiling.py [MODEL TYPE ...]

Two padded prompts of a tiny random model under CLVA: the tokens of both ways, how far their logits
are apart, how far CLVA moves them, and how many graphs there were; or why it is refused. A llava is
done in bfloat16 and float16 too. Graphs are run without kernels of their own (backend "eager").
"""

import sys
from typing import Any

import torch
from survey_table import NAMES
from tiny_families import batch, sample, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GenerationConfig, PreTrainedModel

import clva_lens as cl
from clva_lens.ground.errors import ClvaLensError
from clva_lens.lens import compiled
from clva_lens.lens.decoding import Watch

NEW = 6
HALVES = (torch.bfloat16, torch.float16)


def logits_of(model: PreTrainedModel, inputs: Any, how: str, *methods: Any) -> Any:
    """Return the tokens, and the logits that chose each of them."""
    config = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, num_beams=1, pad_token_id=0, bos_token_id=1
    )
    seen: list[torch.Tensor] = []
    look = Watch.look

    def keep(watch: Watch, last: torch.Tensor) -> None:
        seen.append(last.float())
        look(watch, last)

    Watch.look = keep  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with torch.no_grad(), cl.intervening(model, *methods) as run, Watch(model) as watch:
            if how == "compiled":
                out: Any = compiled.generate_compiled(
                    model, repr(methods), run.sessions, watch, generation_config=config, **inputs
                )
            else:
                found: Any = model
                more = {"cache_implementation": "static", "disable_compile": True}
                out = found.generate(**inputs, generation_config=config, **more)
    finally:
        Watch.look = look
    return out[:, -NEW:], torch.stack(seen)


def told(kind: str, dtype: torch.dtype = torch.float32) -> str:
    """Return what is found for one model type."""
    try:
        model = tiny_model(kind)
        inputs = batch([sample(kind, 0, words=5), sample(kind, 1, words=7)])
    except Exception as error:
        return f"not made here: {type(error).__name__}"
    if dtype != torch.float32:
        model = model.to(dtype)  # pyright: ignore[reportArgumentType]
        inputs = {n: one.to(dtype) if one.is_floating_point() else one for n, one in inputs.items()}
    counter = CompileCounterWithBackend("eager")
    compiled.COMPILING, method = {"backend": counter}, cl.CLVA(tau=1.0, site="decoder")
    try:
        ids, logits = logits_of(model, inputs, "compiled", method)
        usual, expected = logits_of(model, inputs, "eager", method)
        _, plain = logits_of(model, inputs, "eager")
    except ClvaLensError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    error, effect = (float((logits - one).abs().max()) for one in (expected, plain))
    same = "the same tokens" if torch.equal(ids, usual) else "OTHER TOKENS"
    return f"{same}, {counter.frame_count} graph(s), error {error:.1e}, effect {effect:.2g}"


if __name__ == "__main__":
    for kind in sys.argv[1:] or sorted(NAMES):
        print(f"{kind}: {told(kind)}", flush=True)
        torch._dynamo.reset()
    for half in HALVES if not sys.argv[1:] or "llava" in sys.argv else ():
        compiled._COMPILED.clear()
        print(f"llava, {half}: {told('llava', half)}", flush=True)
