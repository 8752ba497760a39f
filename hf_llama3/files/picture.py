"""Pictures by matplotlib, where it is installed."""

from pathlib import Path

from hf_llama3.errors import UserError

from .atomic import system_errors


def draw_bars(
    bars: dict[str, list[float]], label: str, path: Path, limits: dict[str, float] | None = None
) -> str | None:
    """Draw a stacked bar for each name; where matplotlib is missing, return a note instead.

    Args:
        label: label of the axis along the bars.
        limits: a red line for each bar that has a limit.

    Raises:
        UserError: the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return 'no picture was drawn; for one, pip install "hf_llama3[plot]"'
    figure = Figure(figsize=(8, 1.2 + 0.6 * len(bars)), layout="constrained")
    axes, colours = figure.subplots(), ("tab:blue", "tab:cyan")
    for row, (name, stripes) in enumerate(bars.items()):
        axes.barh(name, filled := 0)  # so that a name without stripes has a row, too
        for index, width in enumerate(stripes):
            axes.barh(name, width, left=filled, color=colours[index % 2])
            filled += width
        if limits and name in limits:
            axes.plot([limits[name]] * 2, [row - 0.4, row + 0.4], color="tab:red")
    axes.set(xlabel=label)
    axes.set_xlim(0, 1.25 * max(map(sum, bars.values())) or 1)
    axes.invert_yaxis()
    endings = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in endings:
        raise UserError(f"--plot must end in one of {', '.join(endings)}, got {path}; choose another name")
    with system_errors(path, "choose another --plot"):
        figure.savefig(path, dpi=120)
    return None


def plot_curves(curves: dict[str, list[tuple[int, float]]], path: Path) -> str | None:
    """Draw losses in nats per token over steps; where matplotlib is missing, return a note instead."""
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
