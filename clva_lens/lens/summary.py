"""A model in a few sentences: its parts, and its sites of attention."""

from collections.abc import Iterator

from transformers import PreTrainedModel

from clva_lens.models.family import Site, find_family


def model_facts(model: PreTrainedModel) -> Iterator[str]:
    """Yield sentences on a model's parts and its attention sites."""
    parameters = model.num_parameters()  # packed weights count as what they stand for
    kinds = sorted({str(one.dtype).removeprefix("torch.") for one in model.parameters()})
    places = {str(one.device) for one in model.parameters()}
    devices = sorted("meta (offloaded)" if one == "meta" else one for one in places)
    family = find_family(model)
    yield (
        f"{type(model).__name__}, model type '{model.config.model_type}', family "
        f"'{family.name}'; {parameters / 1e6:,.1f} million parameters, "
        f"{' and '.join(kinds)}, on {', '.join(devices)}"
    )
    for site in family.sites(model):
        yield _site_fact(site)
    yield from family.notes(model)


def _site_fact(site: Site) -> str:
    heads = getattr(site.config, "num_attention_heads", None)
    keys = getattr(site.config, "num_key_value_heads", None) or heads
    shared = f" ({keys} of keys)" if keys != heads else ""
    count = f"{len(site.layers)} of {site.depth}" if len(site.layers) < site.depth else site.depth
    kernel = site.config._attn_implementation
    return f"site '{site.name}': {count} layers, {heads} heads{shared}, kernel '{kernel}'"
