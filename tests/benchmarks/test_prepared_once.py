"""A picture is opened once and prepared once, whatever is asked about it."""

from collections import Counter
from contextlib import contextmanager

import pytest
from PIL import Image
from test_sharing import Shared
from tiny_models import QUESTIONS, blip_of, lens_of, picture

import clva_lens as cl
from clva_lens.lens.sharing import why_unshared
from clva_lens.models import once, pictures
from clva_lens.models.once import Prepared
from clva_lens.models.pictures import Opened


@contextmanager
def counting(lens, patch):
    """Yield how often pictures were opened, and how many the image processor was given."""
    counts = Counter()
    kind, read = type(lens.processor.image_processor), pictures.read_image
    call = kind.__call__

    def prepare(self, images, *args, **options):
        # Those of noise, by which a processor is tried once, have another size.
        counts["prepared"] += sum(one.size == (32, 32) for one in once._flat(images))
        return call(self, images, *args, **options)

    def opened(image, *args):
        counts["opened"] += not isinstance(image, Opened)
        return read(image, *args)

    with patch.context() as change:
        change.setattr(kind, "__call__", prepare)
        change.setattr(pictures, "read_image", opened)
        yield counts


@pytest.mark.parametrize(("share", "size"), [("picture", 6), ("picture", 2), (None, 4)])
@pytest.mark.parametrize("kind", ["llava", "instructblip"])
def test_once_a_picture(kind, share, size, monkeypatch):
    """Whatever is shared, whatever the batch, for several methods: VisFlow shares nothing."""
    lens = lens_of("full", "sdpa") if kind == "llava" else blip_of("sdpa")
    methods = [None, cl.VisFlow(), cl.KnockOut()] if kind == "llava" else [None, cl.KnockOut()]
    why_unshared(lens, None)  # what is probed once a model
    with counting(lens, monkeypatch) as counts:
        cl.evaluate(lens, Shared(), methods=methods, share=share, batch_size=size, progress=False)
    assert counts == {"prepared": 4, "opened": 4}


def test_once_for_questions_asked_by_hand(one, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(picture(0)).save(path)
    cl.generate(one, [(str(path), QUESTIONS[0])] * 2, progress=False)
    with counting(one, monkeypatch) as counts:
        cl.generate(one, [(str(path), text) for text in QUESTIONS], progress=False)
        assert counts == {"prepared": 1, "opened": 1}
        prefix = cl.read(one, path)
        for text in QUESTIONS:
            cl.generate(one, (prefix, text))
        assert counts == {"prepared": 2, "opened": 2}


def test_what_is_no_more_shown_is_forgotten(one, monkeypatch):
    prepared = Prepared(one.processor)
    images = prepared.processor.image_processor
    monkeypatch.setattr(once, "KEPT", 2)
    for seed in range(4):
        one.prompt(prepared.show([picture(seed)]), QUESTIONS[:1], processor=prepared.processor)
        assert len(images._made) == len(prepared._shown) == min(seed + 1, 2)
