"""
What a config names, looked at before anything is computed: the model, its checkpoint, the data's place.

Nothing of the user's own code is run unless that is allowed.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nncf_mpq_plugin.config import Config
from nncf_mpq_plugin.costs import LatencyTable
from nncf_mpq_plugin.data import check_source_name
from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.models import (
    build_model,
    check_model,
    import_callable,
    is_foreign,
    load_weights,
    read_state,
    split_callable,
)


def check_sources(config: Config, *, allow_code: bool = False) -> list[str]:
    """
    Build the model, run it once, read the checkpoint and the latency table, and look for the data.

    :param allow_code: whether callables outside torchvision and this package may be imported. The model's is called
        then, the data's is not.
    :return: what was left out because it would have run such code.
    :raises InputError: if something is missing or does not fit.
    """
    left_out = []
    if is_foreign(config.model) and not allow_code:
        split_callable(config.model, "model")
        left_out.append(f"model {config.model}")
        if config.checkpoint is not None:
            read_state(config.checkpoint)
    else:
        arguments = dict(config.model_arguments)
        if config.model.startswith("torchvision:"):
            arguments.pop("weights", None)  # would be downloaded
        model = build_model(config.model, arguments, allow_code=allow_code)
        if config.checkpoint is not None:
            load_weights(model, config.checkpoint)
        check_model(model, torch.zeros(2, *config.sample_size[1:]))
    source = config.data.source
    check_source_name(source)
    if source.startswith("imagefolder:"):
        _check_image_folder(Path(source.removeprefix("imagefolder:")))
    elif ":" in source:
        if allow_code:
            import_callable(source, "data.source", allow_code=True)
        else:
            split_callable(source, "data.source")
            left_out.append(f"data {source}")
    if config.latency_table is not None:
        LatencyTable.load(config.latency_table)
    return left_out


def _check_image_folder(directory: Path) -> None:
    """:raises InputError: if a part or its classes are missing; images are not looked at."""
    for part in ("train", "val"):
        path = directory / part
        if not path.is_dir() or not any(entry.is_dir() for entry in path.iterdir()):
            msg = f"data.source: {path}: no images by class. Expected {path}/CLASS/IMAGE.jpg."
            raise InputError(msg)
