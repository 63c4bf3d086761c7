"""Figure 6: maps of the layers after the anchor, about a backpack."""

from clva_lens.experiments.reproduce.items import register
from clva_lens.experiments.reproduce.maps import Overlays


@register
class Figure6(Overlays):
    """A backpack."""

    name = "figure 6"
    title = "is there a backpack in the image?"
    method = (
        "Eq. 4 with all heads, greedily and under CLVA, on the first picture of POPE's COCO "
        "random set that is asked for a backpack and has one: the paper names no picture. The "
        "edit puts attention on the anchor's tokens, so a return to them is no finding; beside "
        "it stands CLVA on as many random tokens, and the answer with the picture knocked out."
    )
    kind = "backpack"
