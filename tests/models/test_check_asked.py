"""The check at load: the question and the picture both reach the model."""

import pytest
from tiny_models import lens_of, make_processor

import clva_lens as cl
from clva_lens.ground.errors import ModelCheckError
from clva_lens.toy.build import CHAT_TEMPLATE


def test_a_template_that_drops_the_question():
    deaf = CHAT_TEMPLATE.replace(
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}", "{% endif %}{% endfor %}"
    )
    assert deaf != CHAT_TEMPLATE
    model = lens_of("full", "sdpa").hf_model
    with pytest.raises(ModelCheckError, match=r"two different questions.*Probably the chat templ"):
        cl.load((model, make_processor(chat_template=deaf)))


def test_a_processor_that_makes_all_pictures_one(monkeypatch):
    processor = make_processor()
    kind = type(processor.image_processor)
    resize = kind.preprocess

    def blank(self, images, *args, **options):
        made = resize(self, images, *args, **options)
        made["pixel_values"] = made["pixel_values"] * 0
        return made

    monkeypatch.setattr(kind, "preprocess", blank)
    with pytest.raises(ModelCheckError, match=r"two different pictures.*the image processor drops"):
        cl.load((lens_of("full", "sdpa").hf_model, processor))
