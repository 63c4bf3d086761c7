"""A small sparse autoencoder of a toy's stream, trained in seconds.

    python -m clva_lens.experiments.toy_sae --out FOLDER

Rows are those of the image tokens of toy scenes. The loss is ½·|x − x̂|² + λ·Σ f, with decoder rows
of length 1, by Adam; rows are divided by their mean length while it trains, which is folded into
the weights afterwards.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from clva_lens.lens.load import load
from clva_lens.lens.sae_reading import span_rows_of
from clva_lens.methods.sae import SparseAutoencoder
from clva_lens.toy.scenes import render, sample_scenes


@torch.no_grad()
def toy_rows(model: Any, layer: int, scenes: int, seed: int) -> Tensor:
    """Return the stream of the image tokens of scenes after a layer, [row, width]."""
    eye = torch.eye(model.hf_model.config.get_text_config().hidden_size)
    empty = torch.zeros(len(eye))
    place = SparseAutoencoder(eye, eye, empty, empty, layer)
    rows = [
        span_rows_of(
            model.hf_model, model.prompt(render(scene), "describe the image."), place, "image"
        )[0]
        for scene in sample_scenes(scenes, seed)
    ]
    return torch.cat(rows)


def train_sae(
    rows: Tensor,
    layer: int,
    *,
    features: int = 256,
    sparsity: float = 0.02,
    steps: int = 400,
    batch: int = 256,
    rate: float = 3e-3,
    seed: int = 0,
) -> SparseAutoencoder:
    """Return a standard autoencoder of these rows; the same seed gives the same one."""
    generator = torch.Generator().manual_seed(seed)
    middle = rows.mean(dim=0)
    scale = float((rows - middle).norm(dim=1).mean())
    data = (rows - middle) / scale
    decoding = torch.randn(features, rows.shape[1], generator=generator)
    decoding = (decoding / decoding.norm(dim=1, keepdim=True)).requires_grad_()
    encoding = decoding.detach().T.clone().requires_grad_()
    bias = torch.zeros(features, requires_grad=True)
    shift = torch.zeros(rows.shape[1], requires_grad=True)
    learner = torch.optim.Adam([encoding, decoding, bias, shift], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            some = data[torch.randint(len(data), (batch,), generator=generator)]
            found = ((some - shift) @ encoding + bias).relu()
            left = found @ decoding + shift - some
            loss = 0.5 * left.square().sum(dim=1).mean() + sparsity * found.sum(dim=1).mean()
            learner.zero_grad()
            loss.backward()
            learner.step()
            with torch.no_grad():
                decoding /= decoding.norm(dim=1, keepdim=True)
    with torch.no_grad():  # of rows as they are: f is as large as in the scaled ones, times scale
        return SparseAutoencoder(
            encoding.detach().clone(),
            decoding.detach().clone(),
            bias.detach() * scale,
            middle + shift.detach() * scale,
            layer,
            record={"trained_on": f"{len(rows)} image rows of toy scenes", "seed": seed},
        )


def main() -> None:
    """Train one on toy-llava and write it in SAELens' layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="toy-llava")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    rows = toy_rows(load(given.model), given.layer, given.scenes, seed=1)
    train_sae(rows, given.layer, features=given.features).save(given.out)


if __name__ == "__main__":
    main()
