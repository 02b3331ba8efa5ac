"""The loss over the steps of a run as an image."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

SIZE, MARGIN = (960, 480), 60  # pixels
COLOURS = {"train/loss": "#888888", "val_plain/loss": "#1f77b4", "val_ema/loss": "#d62728"}


def draw_curves(lines: Sequence[dict]) -> Image.Image | None:
    """Metrics of `COLOURS` over the steps; None if none of them has two values.

    Args:
        lines: those of metrics.jsonl.
    """
    curves = {name: [(line["step"], line[name]) for line in lines if line.get(name) is not None] for name in COLOURS}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return None

    # ranges of the axes
    steps = [step for points in curves.values() for step, _ in points]
    losses = [loss for points in curves.values() for _, loss in points]
    (left, right), (low, high) = (min(steps), max(steps)), (min(losses), max(losses))
    high = high if high > low else low + 1

    def place(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (SIZE[0] - 2 * MARGIN) * (step - left) / (right - left)
        return x, SIZE[1] - MARGIN - (SIZE[1] - 2 * MARGIN) * (loss - low) / (high - low)

    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle([place(left, high), place(right, low)], outline="#cccccc")
    for number, (name, points) in enumerate(curves.items()):
        draw.line([place(*point) for point in points], fill=COLOURS[name], width=2)
        draw.text((MARGIN + 200 * number, 20), name, fill=COLOURS[name], font_size=16)

    # ends of the axes
    draw.text((MARGIN, SIZE[1] - MARGIN + 8), f"step {left:,}", fill="black", font_size=14)
    draw.text((SIZE[0] - MARGIN, SIZE[1] - MARGIN + 8), f"{right:,}", fill="black", anchor="ra", font_size=14)
    draw.text((MARGIN - 8, SIZE[1] - MARGIN), f"{low:.3g}", fill="black", anchor="rs", font_size=14)
    draw.text((MARGIN - 8, MARGIN), f"{high:.3g}", fill="black", anchor="rt", font_size=14)
    return image
