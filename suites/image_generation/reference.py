"""Reference statistics of a paper setting's own data, in the features that it is judged in.

    python -m distillbench.suites.image_generation.reference cifar10-fidelity DIR

writes ``mu`` and ``sigma`` of all images to the place under DIR where the setting looks for them. Published statistics are to be
preferred where there are any: this is for feature networks that have none.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from distillbench.cards import registry
from distillbench.cards.card import Setting
from distillbench.errors import UserError, unknown
from distillbench.files import write_atomic
from distillbench.runs.suite import Context
from distillbench.suites.image_generation import published
from distillbench.suites.metrics.images.frechet import Moments


def statistics(ctx: Context) -> Moments:
    """Mean and covariance of the features of every image of the setting's data. Raises UserError where data or network are missing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, images = published.extractor(ctx, device), published.images_of(ctx)
    return Moments.stream(network.features(part) for part in published.stacked(images, range(len(images))))


def write(setting: Setting, data: Path) -> Path:
    """Make the statistics and write them as an npz; its path.

    Raises:
        UserError: there are statistics already, or as :func:`statistics`.  SaveError: the file cannot be written.
    """
    place = data / str(setting.options["reference_path"][0])
    if place.exists():
        raise UserError(f"{place}: is there already; remove it to make it anew")
    moments = statistics(Context("the setting", setting, {}, data=data))
    content = io.BytesIO()
    np.savez(content, mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    write_atomic(place, content.getvalue())
    return place


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the path on stdout, or one line on stderr and the error's exit code."""
    parser = argparse.ArgumentParser(prog="python -m distillbench.suites.image_generation.reference", description=__doc__)
    parser.add_argument("setting", help="of image-generation, with data and statistics in a folder of yours")
    parser.add_argument("data", type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        known = registry.suite_card(registry.find("suite", "image-generation")).settings
        fitting = {name: s for name, s in known.items() if "reference_path" in s.options}
        if args.setting not in fitting:
            raise unknown("setting with reference statistics", args.setting, fitting)
        print(write(fitting[args.setting], args.data))
    except UserError as error:
        print(f"distillbench: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
