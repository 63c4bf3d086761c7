"""Figure 7: maps of the layers after the anchor, about a bicycle."""

from clva_lens.experiments.reproduce.items import register
from clva_lens.experiments.reproduce.maps import Overlays


@register
class Figure7(Overlays):
    """A bicycle."""

    name = "figure 7"
    title = "is there a bicycle in the image?"
    method = "As Fig. 6, on the first picture that is asked for a bicycle and has one."
    kind = "bicycle"
