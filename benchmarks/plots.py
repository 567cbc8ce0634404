"""Plots of the results of speed.py, as SVG."""

from pathlib import Path
from typing import Any

OURS, OTHERS = "#2f6db3", "#b8bec6"


def draw_peers(results: dict[str, Any], path: Path) -> None:
    """Draw the prefill and decoding speed of every engine as bars."""
    figure, panels = _figure()
    engines = results["engines"]
    for axes, key, title in zip(
        panels,
        ("prefill_tokens_per_s", "decode_tokens_per_s"),
        ("prefill, 512 tokens", "decoding, one sequence"),
        strict=True,
    ):
        values = [engine[key] for engine in engines.values()]
        colours = [
            OURS if name.startswith("llama") and name != "llama.cpp" else OTHERS for name in engines
        ]
        bars = axes.barh(list(engines), values, color=colours)
        axes.bar_label(bars, fmt="%.0f" if key.startswith("prefill") else "%.1f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(f"{title}: tokens per second")
    figure.savefig(path)


def draw_growth(results: dict[str, Any], path: Path) -> None:
    """Draw the speed of decoding by the context's length and by the batch."""
    figure, (left, right) = _figure()
    context = {int(n): speed for n, speed in results["growth"]["context"].items()}
    left.plot(list(context), [1000 / speed for speed in context.values()], "o-", color=OURS)
    left.set_ylim(bottom=0)
    left.set_title("milliseconds a token")
    left.set_xlabel("tokens in the cache")
    batch = {int(n): speed for n, speed in results["growth"]["batch"].items()}
    right.plot(list(batch), list(batch.values()), "o-", color=OURS)
    right.plot(list(batch), [n * batch[1] for n in batch], ":", color=OTHERS)
    right.set_ylim(bottom=0)
    right.set_title("tokens per second of all sequences (dots: proportional)")
    right.set_xlabel("sequences")
    figure.savefig(path)


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "llama"  # so that equal results make equal files
    figure, panels = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
