"""A picture of a batch: every instance a line, every document a colour, padding grey.

In: rows of instances and their datasets. Out: a PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.documents import document_boundaries, inputs_of

PADDING = "#d0d0d0"
COLOURS = ("#4477aa", "#99bbdd", "#228833", "#88cc99", "#aa6622", "#ddaa77")  # two shades a dataset, in turn


def document_shades(rows: np.ndarray, eos_id: int) -> np.ndarray:
    """0 or 1, changing from document to document, -1 for padding: int64 [rows, sequence_length]."""
    ids = inputs_of(rows)
    lengths = np.diff(document_boundaries(ids, eos_id))
    shades = (np.repeat(np.arange(len(lengths)), lengths) % 2).reshape(ids.shape)
    padding = (rows[:, :-1] == ~eos_id) & (rows[:, 1:] == ~eos_id)
    padding[:, -1] = rows[:, -2] == ~eos_id
    return np.where(padding, -1, shades)


def draw_batch(
    groups: Sequence[tuple[str, np.ndarray, np.ndarray]], names: Sequence[str], eos_id: int, path: Path
) -> None:
    """Draw batches one above the other.

    Args:
        groups: title, instances [rows, sequence_length + 1], number of each row's dataset [rows].
        names: of the datasets.
        eos_id: what ends a document.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    heights = [len(rows) for _, rows, _ in groups]
    figure, axes = pyplot.subplots(
        len(groups),
        1,
        figsize=(10, 1.2 + 0.17 * sum(heights) + 0.6 * len(groups)),
        height_ratios=heights,
        squeeze=False,
    )
    colours = ListedColormap([PADDING, *COLOURS])
    for axis, (title, rows, numbers) in zip(axes[:, 0], groups, strict=True):
        shades = document_shades(rows, eos_id)
        kinds = np.where(shades < 0, 0, 1 + 2 * (numbers[:, None] % (len(COLOURS) // 2)) + shades)
        axis.imshow(kinds, aspect="auto", cmap=colours, vmin=0, vmax=len(COLOURS), interpolation="nearest")
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylabel("instance", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.hlines(np.arange(1, len(rows)) - 0.5, -0.5, shades.shape[1] - 0.5, color="white", linewidth=1)
    axes[-1, 0].set_xlabel("position", fontsize=8)
    entries = [Patch(color=COLOURS[2 * i % len(COLOURS)], label=name) for i, name in enumerate(names)]
    figure.legend(
        handles=[*entries, Patch(color=PADDING, label="padding")], ncols=len(names) + 1, loc="lower center", fontsize=8
    )
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
