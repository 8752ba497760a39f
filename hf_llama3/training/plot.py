"""The curves of a training run as a picture."""

from pathlib import Path


def plot_curves(curves: dict[str, list[tuple[int, float]]], path: Path) -> str | None:
    """Draw losses in nats per token over steps; return a note where matplotlib is missing, instead."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return 'no picture of the curves was drawn; for one, pip install "hf_llama3[plot]"'
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, points), style in zip(curves.items(), ({"alpha": 0.5}, {"marker": "o", "markersize": 3}), strict=True):
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return None
