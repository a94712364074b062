"""Pictures that put several results side by side."""
from io import BytesIO
from pathlib import Path

import numpy as np

from hsi_mamba_nb.files import write_file
from hsi_mamba_nb.learn.training import show_history
from hsi_mamba_nb.scene.split import show_split
from hsi_mamba_nb.start.notation import PALETTE, class_colours, false_colour, show_image, show_labels, style

__all__ = ["save_figure", "thread_picture"]


def save_figure(
    fig,  # a matplotlib figure
    path: str | Path,
) -> Path:
    "Write a figure whole or not at all, and close it."
    import matplotlib.pyplot as plt
    buffer = BytesIO()
    fig.savefig(buffer, format=Path(path).suffix.lstrip(".") or "png")
    plt.close(fig)
    return write_file(path, buffer.getvalue())


def _bars(ax, table):
    "table: split name -> {who: overall accuracy}."
    who = list(next(iter(table.values())))
    for i, (name, row) in enumerate(table.items()):
        for j, w in enumerate(who):
            y = -(i + j*.38)
            ax.barh(y, row[w], .34, color=PALETTE[j])
            ax.annotate(f"{row[w]:.3f}  {w}", (row[w], y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set(title="The same model, two ways to score it", xlabel="overall accuracy on test pixels", xlim=(0, 1.75), xticks=np.linspace(0, 1, 6),
           yticks=[-(i + .19) for i in range(len(table))])
    ax.set_yticklabels(list(table))


def thread_picture(
    scene,  # with labels
    run,  # trained on run.split
    result,  # SceneMap of the scene
    table: dict,  # split name -> {who: overall accuracy}
):
    "Scene, split, labels, map, curves and scores in one figure."
    import matplotlib.pyplot as plt
    style()
    fig, ax = plt.subplots(2, 3, figsize=(15, 8))
    show_image(false_colour(scene.cube, scene.wavelengths_nm), f"{scene.name}: {scene.shape[0]} x {scene.shape[1]} pixels, {scene.bands} bands", ax[0, 0])
    show_labels(scene.labels, scene.class_names, "What is on the ground", ax[0, 1])
    show_split(run.split, ax[0, 2]).set_title("Who may learn from what: blocks with a buffer")
    show_image(class_colours(scene.classes)[result.classes], "What the model says", ax[1, 0])
    show_history(run, ax[1, 1])
    _bars(ax[1, 2], table)
    return fig
