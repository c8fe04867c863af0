"""
A picture of what was spent: busy money against idle money, by day or by whatever a report is grouped by.

matplotlib comes with the extra `plot` and is imported when a picture is drawn. The figure is made without `pyplot`:
nothing global changes in a program that draws one. What the bars mean is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from runcomfy.adapters.files import write_atomically
from runcomfy.domain.exceptions import ExtraMissing, ValueInvalid, foreign_text
from runcomfy.domain.money import show_usd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS: Final = (".png", ".svg")
MOST_BARS: Final = 15
"""Of anything but days; the rest are put together."""
_BUSY, _IDLE, _NOBODY = "#1f5fa8", "#f0a33a", "#c9ced6"
"""Told apart by lightness, too: in print, and by people who see few colours."""
_INK, _FAINT = "#1d2733", "#dfe3e8"
_WIDTH, _HEIGHT, _DPI = 9.0, 4.5, 150


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar. Money is USD."""

    label: str
    busy: Decimal
    idle: Decimal
    """Caused by jobs: loading, waiting, being kept warm."""
    nobody: Decimal
    """Caused by no job."""

    @property
    def usd(self) -> Decimal:
        """Its length."""
        return self.busy + self.idle + self.nobody


def check_name(path: Path) -> None:
    """Refuse a file name that no picture can have, before anything is asked of anybody. Raises ValueInvalid."""
    if path.suffix.lower() not in FORMATS:
        raise ValueInvalid(
            f"{foreign_text(path.name, 80)!r} is not the name of a picture",
            hint=f"let it end in {' or '.join(FORMATS)}",
        )


def draw(bars: Sequence[Bar], path: Path, *, title: str, what: str, days: bool) -> None:
    """Write a picture with one bar for each of `bars`, upright for days, lying for anything else.

    `what` names the bars' axis. Blocks; the file is whole or as it was before. Raises ValueInvalid (the name),
    ExtraMissing, LocalError.
    """
    check_name(path)
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExtraMissing(
            "drawing needs matplotlib, which is not installed",
            hint='install it with: pip install "runcomfy-orchestrator[plot]"',
        ) from error
    raw = BytesIO()
    with rc_context({"font.family": "sans-serif", "font.size": 11, "svg.hashsalt": "costs", "svg.fonttype": "none"}):
        figure = Figure(figsize=(_WIDTH, _HEIGHT if days else _tall(len(bars))))
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
        axes = figure.add_subplot()
        (_upright if days else _lying)(axes, bars, what)
        _dress(figure, axes, title, days=days)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(raw, format=path.suffix.lower()[1:], dpi=_DPI, facecolor="white", metadata=metadata)
    write_atomically(path, raw.getvalue(), mode=0o644)


def _plain(text: str) -> str:
    """Return a text that is drawn as it is: between two dollar signs matplotlib sees mathematics."""
    return text.replace("$", r"\$")


def _tall(count: int) -> float:
    return max(3.0, 1.8 + 0.38 * count)


def _upright(axes: Axes, bars: Sequence[Bar], what: str) -> None:
    places = range(len(bars))
    bottom = [0.0] * len(bars)
    for name, colour, values in _layers(bars):
        axes.bar(places, values, bottom=bottom, color=colour, label=name, width=0.8 if len(bars) > 1 else 0.3)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    every = max(1, -(-len(bars) // 12))  # more labels than these run into each other at half the size
    axes.set_xticks(list(places)[::every], [_plain(bar.label) for bar in bars][::every])
    middle, half = (len(bars) - 1) / 2, max(len(bars), 4) / 2
    axes.set_xlim(middle - half - 0.2, middle + half + 0.2)
    axes.set_xlabel(what)
    axes.set_ylabel("USD")
    axes.set_ylim(0, max([*bottom, 0.01]) * 1.12)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)


def _lying(axes: Axes, bars: Sequence[Bar], what: str) -> None:
    places = range(len(bars))
    left = [0.0] * len(bars)
    for name, colour, values in _layers(bars):
        axes.barh(places, values, left=left, color=colour, label=name, height=0.72)
        left = [low + value for low, value in zip(left, values, strict=True)]
    most = max([*left, 0.01])
    for place, bar, end in zip(places, bars, left, strict=True):
        axes.text(end + most * 0.01, place, _plain(show_usd(bar.usd)), va="center", color=_INK)
    axes.set_yticks(list(places), [_plain(bar.label) for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_ylabel(what)
    axes.set_xlabel("USD")
    axes.set_xlim(0, most * 1.15)
    axes.grid(axis="x", color=_FAINT, linewidth=0.8)


def _layers(bars: Sequence[Bar]) -> list[tuple[str, str, list[float]]]:
    return [
        ("computing", _BUSY, [float(bar.busy) for bar in bars]),
        ("loading, waiting, kept warm", _IDLE, [float(bar.idle) for bar in bars]),
        ("idle, nobody's", _NOBODY, [float(bar.nobody) for bar in bars]),
    ]


def _dress(figure: Figure, axes: Axes, title: str, *, days: bool) -> None:
    from matplotlib.patches import Patch

    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK)
    money = axes.yaxis if days else axes.xaxis
    digits = 2 if money.get_view_interval()[1] >= 0.1 else 4
    money.set_major_formatter(lambda value, _: f"{value:,.{digits}f}")
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.set_title(_plain(title), loc="left", color=_INK, fontsize=13, pad=10)
    # By hand: where there are no bars at all matplotlib knows no colours.
    parts = [Patch(color=colour, label=name) for name, colour, _ in _layers(())]
    figure.legend(handles=parts, loc="outside lower left", ncols=3, frameon=False, labelcolor=_INK)
