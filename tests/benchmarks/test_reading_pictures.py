"""How a benchmark's pictures are read is a setting of it: recorded, and obeyed."""

import numpy as np
import pytest
from PIL import Image
from tiny_models import lens_of

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS, Sample
from clva_lens.benchmarks.files import PictureBenchmark, write_lines
from clva_lens.benchmarks.pope_sets import Pope
from clva_lens.benchmarks.run_folder import benchmark_of, class_name
from clva_lens.ground.errors import ParameterError
from clva_lens.models.pictures import read_image

OF_FILES = [one for _, one in BENCHMARKS.items() if isinstance(one, PictureBenchmark)]


def turned(path):
    """A picture whose file says that it lies on its side."""
    tag = Image.Exif()
    tag[0x0112] = 6
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[:10, :10] = 255
    Image.fromarray(pixels).save(path, exif=tag)


def test_every_benchmark_with_picture_files_has_the_settings():
    assert {type(one).__name__ for one in OF_FILES} == {"Pope", "Mme", "ChairCoco", "LlavaBench"}
    toys = [one for name, one in BENCHMARKS.items() if "toy" in name]
    assert toys and not any(isinstance(one, PictureBenchmark) for one in toys)


@pytest.mark.parametrize("benchmark", OF_FILES, ids=lambda one: one.name)
def test_default_is_what_the_official_scripts_read(tmp_path, benchmark):
    turned(tmp_path / "picture.png")
    sample = Sample("1", tmp_path / "picture.png", "?", "yes")
    stored = np.asarray(Image.open(sample.image).convert("RGB"))
    assert np.array_equal(read_image(benchmark.picture(sample)), stored)
    kind = type(benchmark)
    upright = kind(**(benchmark.settings | {"orientation": "upright"}))
    assert np.array_equal(read_image(upright.picture(sample)), np.rot90(stored, -1))
    for setting in ({"orientation": "up"}, {"background": "invisible"}):
        with pytest.raises(ParameterError, match=r"must be"):
            kind(**(benchmark.settings | setting))


@pytest.mark.parametrize("benchmark", OF_FILES, ids=lambda one: one.name)
def test_records_from_before_the_settings_still_load(benchmark):
    since = ("orientation", "background", "readout", "objects", "nltk")
    old = {key: value for key, value in benchmark.settings.items() if key not in since}
    record = {
        "benchmark": benchmark.name,
        "benchmark_class": class_name(type(benchmark)),
        "benchmark_version": benchmark.version,
        "settings": old,
    }
    assert benchmark_of(record, {}) == benchmark
    assert benchmark_of(record, {"background": "white"}).settings["background"] == "white"


def test_the_setting_decides_the_answers_and_stands_in_the_record(tmp_path):
    turned(tmp_path / "picture.png")
    row = {"question_id": 1, "image": "picture.png", "text": "is there a cup ?", "label": "yes"}
    write_lines(tmp_path / "coco_pope_random.json", [row])
    folders = {"data": str(tmp_path), "images": str(tmp_path), "protocol": "bare"}
    margins = {}
    for orientation in ("as stored", "upright"):
        benchmark = Pope("coco", "random", orientation=orientation, **folders)
        report = cl.evaluate(lens_of("full", "sdpa"), benchmark, progress=False)
        assert report.record["settings"]["orientation"] == orientation
        assert report.record["settings"]["background"] is None
        margins[orientation] = report.rows[0]["margin"]
    assert margins["as stored"] != margins["upright"]
