"""``clva-lens explore``: one prompt as a page that opens from disk."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from clva_lens.experiments.commands import Device, Dtype


def explore(
    image: Annotated[Path, typer.Option(help="Your picture.")],
    question: Annotated[str, typer.Option(help="Your question about it.")],
    out: Annotated[Path, typer.Option(help="The page to write, .html.")] = Path("explorer.html"),
    model: Annotated[str, typer.Option(help="A toy name, a Hub id or a folder.")] = "toy-llava",
    method: Annotated[str, typer.Option(help="A method, or none.")] = "clva",
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", help="Of the method, as alpha=10; repeatable."),
    ] = None,
    beside: Annotated[
        str | None, typer.Option(help="A second question, shown beside it with linked cursors.")
    ] = None,
    arrays: Annotated[Path | None, typer.Option(help="Also keep the arrays, .npz.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of the answer.", min=1)] = 20,
    knock_outs: Annotated[
        bool, typer.Option(help="Also measure each layer blind, a pass for each.")
    ] = True,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Write a page to touch: where a model looks as it answers, before and after a method."""
    from clva_lens.ground.errors import ParameterError
    from clva_lens.ground.settings import parse_settings
    from clva_lens.lens.explorer.explored import npz_path
    from clva_lens.lens.explorer.exploring import explore as read
    from clva_lens.lens.explorer.page import html_path
    from clva_lens.lens.load import check_device, load
    from clva_lens.methods.base import METHODS

    # Everything that can be wrong is looked at before the model is loaded.
    html_path(out)
    if arrays is not None:
        npz_path(arrays)
    if not image.is_file():
        raise ParameterError(f"there is no picture '{image}'. Pass --image with its path.")
    if method == "none" and parameter:
        raise ParameterError(f"-p {parameter[0]} was given without a method. Pass --method too.")
    kind = None if method == "none" else METHODS.get(method)
    chosen = None if kind is None else kind(**parse_settings(kind, parameter or []))
    check_device(device)
    lens = load(model, dtype=dtype, device_map=device)
    told, *others = [
        read(lens, (image, asked), chosen, max_new_tokens=max_new_tokens, knock_outs=knock_outs)
        for asked in (question, beside)
        if asked is not None
    ]
    written = [told.to_html(out, beside=others[0] if others else None)]
    if arrays is not None:
        written.append(told.save(arrays))
    console = Console()
    console.print(repr(told), markup=False, highlight=False)
    for path in written:
        size = path.stat().st_size / 1e6
        console.print(f"{path} ({size:.1f} MB)", markup=False, highlight=False, soft_wrap=True)
