"""Vega-Lite specifications: lines over training, heat maps and bars, in one quiet style."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_multinorm.report.tables import AXES, Clock, Row, as_csv

Spec = dict[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Helvetica, Arial, sans-serif"
RUNS = ("#0b7fc4", "#e0741b", "#0a9b76", "#c2559f", "#8a6fd1", "#b08900", "#3fa7d6", "#c8442f")
"""A run's colour; told apart with any colour vision, and against white as against black."""
KINDS = ("#4477aa", "#ee7733", "#228833", "#aa3377", "#009988", "#ccaa22", "#66aadd", "#cc3311", "#888888")
SMOOTHING = 3  # at first: percent of a line, on either side of a point, that its mean is over
_TITLE = {"tokens": "Tokens", "step": "Optimizer step"}
_POWER = "datum.label == '' ? '' : format(datum.value, datum.value < 0.01 || datum.value >= 1e5 ? '~e' : '~g')"
_COUNT = "replace(format(datum.value, '~s'), 'G', 'B')"  # a billion tokens is B

CONFIG: Spec = {
    "background": None,
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "labelOpacity": 0.75,
        "titleOpacity": 0.75,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "gridColor": "currentColor",
        "gridOpacity": 0.1,
        "gridWidth": 0.6,
        "domainColor": "currentColor",
        "domainOpacity": 0.35,
        "tickColor": "currentColor",
        "tickOpacity": 0.35,
    },
    "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
    "legend": {
        "orient": "top",
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "titleFontWeight": "normal",
        "titleFontSize": 11,
        "labelFontSize": 11,
        "labelLimit": 260,
        "symbolStrokeWidth": 2,
        "symbolOpacity": 1,
        "gradientLength": 140,
        "gradientThickness": 8,
    },
}


@dataclass(frozen=True)
class Canvas:
    """What all figures of a report have in common.

    Attributes:
        runs: names, in the order of their colours.
        clock: unit of times.
        axis: what training is drawn over at first, one of `AXES`.
    """

    runs: Sequence[str]
    clock: Clock
    axis: str

    def axes(self) -> dict[str, Spec]:
        """Encodings of x over training, by field."""
        titles = {**_TITLE, "time": f"Training time ({self.clock.unit})"}
        return {
            field: {
                "field": field,
                "type": "quantitative",
                "title": titles[field],
                "axis": {"grid": False, "labelExpr": _COUNT, "tickCount": 6},
            }
            for field in AXES
        }

    def colours(self) -> Spec:
        """Encoding of the run."""
        colours = [RUNS[index % len(RUNS)] for index in range(len(self.runs))]
        return {
            "field": "run",
            "type": "nominal",
            "scale": {"domain": list(self.runs), "range": colours},
            "legend": {"title": None, "columns": 3} if len(self.runs) > 1 else None,
        }


def over_training(
    canvas: Canvas, rows: Sequence[Row], axis: str, colour: Spec, *, log: bool = False, smooth: bool = False
) -> Spec:
    """Lines over training.

    Args:
        canvas: of the report.
        rows: (tokens, time, step, value, label, mark), the label of the colour's field; the mark is "line" or "point".
        axis: title of y.
        colour: encoding of the label.
        log: y is drawn in powers of ten; else it is if the reader wishes so, and all values are above zero.
        smooth: marks "line" are drawn as they are, faintly, and as a moving mean.
    """
    label = colour["field"]
    y: Spec = {
        "field": "value",
        "type": "quantitative",
        "title": axis,
        "scale": {"zero": False},
        "axis": {"tickCount": 6},
    }
    if log:
        axis_of_powers = {"labelExpr": _POWER, "tickCount": 5}
        y |= {"scale": {"type": "log", "nice": False, "padding": 8}, "axis": axis_of_powers}
    line: Spec = {"type": "line", "strokeWidth": 1.8, "strokeJoin": "round", "clip": True}
    marks = {row[5] for row in rows}
    lengths = Counter(row[4] for row in rows if row[5] == "line")
    longest = max(lengths.values(), default=0)
    positive = all(float(row[3] or 0) > 0 for row in rows)
    layers: list[Spec] = []
    if "line" not in marks:
        pass
    elif smooth:
        window, reach = [{"op": "mean", "field": "value", "as": "smooth"}], round(longest * SMOOTHING / 100)
        moving = {"window": window, "frame": [-reach, reach], "groupby": [label], "sort": [{"field": "step"}]}
        layers.append({"transform": [_only("line")], "mark": {**line, "strokeWidth": 1, "opacity": 0.22}})
        layers.append(
            {"transform": [_only("line"), moving], "mark": line, "encoding": {"y": {**y, "field": "smooth"}}},
        )
    else:
        layers.append({"transform": [_only("line")], "mark": line})
    if "point" in marks:
        marked = {**line, "strokeDash": [5, 3] if smooth else [1, 0], "point": {"size": 34, "filled": True}}
        layers.append({"transform": [_only("point")], "mark": marked})
    layers.append(_nearest(canvas, axis, label))
    return {
        **_data(("tokens", "time", "step", "value", label, "mark"), rows),
        "height": 300 if label == "run" else 220,
        "encoding": {"x": canvas.axes()[canvas.axis], "y": y, "color": colour},
        "layer": layers,
        "usermeta": {"may_be_log": not log and positive, "points": longest},
    }


def _only(mark: str) -> Spec:
    return {"filter": {"field": "mark", "equal": mark}}


def _nearest(canvas: Canvas, axis: str, label: str) -> Spec:
    """Points that show themselves, and what they are, when the pointer is near."""
    titles = {field: encoding["title"] for field, encoding in canvas.axes().items()}
    formats = {"tokens": ".4s", "time": ".4~g", "step": ",.0f"}
    tooltip: list[Spec] = [{"field": label, "type": "nominal", "title": label.capitalize()}]
    tooltip.append({"field": "value", "type": "quantitative", "title": axis, "format": ".4~g"})
    tooltip += [{"field": f, "type": "quantitative", "title": titles[f], "format": formats[f]} for f in AXES]
    hover = {"type": "point", "on": "pointerover", "clear": "pointerout", "nearest": True}
    return {
        "params": [{"name": "near", "select": hover}],
        "mark": {"type": "point", "size": 60, "filled": True, "clip": True},
        "encoding": {
            "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
            "tooltip": tooltip,
        },
    }


def heat_map(rows: Sequence[Row], across: str, down: str, title: str, *, log: bool) -> Spec:
    """Values of cells, told by colour.

    Args:
        rows: (across, down, value); columns are in the order in which they come.
        across: title of the columns.
        down: title of the rows.
        title: of the values.
        log: colours are powers of ten.
    """
    shown = [row for row in rows if not log or float(row[2] or 0) > 0]
    height = max(110, min(26 * len({row[1] for row in rows}), 480))
    scale: Spec = {"scheme": "viridis", "nice": False} | ({"type": "log"} if log else {})
    legend = {"title": title, "format": ".1~e" if log else ".3~g", "tickCount": 3}
    names = {"labelAngle": 0, "ticks": False, "labelExpr": "replace(datum.label, '_proj', '')"}  # room on a phone
    return {
        **_data(("across", "down", "value"), shown),
        "height": height,
        "mark": {"type": "rect", "stroke": None},
        "encoding": {
            "x": {"field": "across", "type": "ordinal", "title": across, "axis": names, "sort": None},
            "y": {"field": "down", "type": "ordinal", "title": down, "sort": "ascending"},
            "color": {"field": "value", "type": "quantitative", "scale": scale, "legend": legend},
            "tooltip": [
                {"field": "down", "type": "ordinal", "title": down},
                {"field": "across", "type": "ordinal", "title": across},
                {"field": "value", "type": "quantitative", "title": title, "format": ".3~g"},
            ],
        },
    }


def bars(canvas: Canvas, rows: Sequence[Row], title: str) -> Spec:
    """Bars of the runs, with their numbers; rows (run, what, value)."""
    by_what = {"field": "what", "type": "nominal", "title": None, "axis": {"ticks": False, "domain": False}}
    return {
        **_data(("run", "what", "value"), rows),
        "height": max(90, 26 * len(rows)),
        "encoding": {
            "y": by_what,
            "yOffset": {"field": "run", "sort": list(canvas.runs)},
            "x": {"field": "value", "type": "quantitative", "title": title, "axis": {"tickCount": 5}},
        },
        "layer": [
            {"mark": {"type": "bar", "cornerRadiusEnd": 2}, "encoding": {"color": canvas.colours()}},
            {
                "mark": {"type": "text", "align": "left", "dx": 4, "fontSize": 11, "color": "currentColor"},
                "encoding": {"text": {"field": "value", "type": "quantitative", "format": ",.0f"}},
            },
        ],
    }


def layers_colour() -> Spec:
    """Encoding of a layer: light for the first, dark for the last would not do on black, so neither end is."""
    scale = {"scheme": {"name": "viridis", "extent": [0.2, 0.92]}, "nice": False}
    return {"field": "layer", "type": "quantitative", "title": "Layer", "scale": scale, "legend": {"tickMinStep": 1}}


def kinds_colour(kinds: Sequence[str]) -> Spec:
    """Encoding of a kind of matrix."""
    colours = [KINDS[index % len(KINDS)] for index in range(len(kinds))]
    legend = {"title": None, "columns": 4, "symbolType": "stroke"}
    return {"field": "kind", "type": "nominal", "scale": {"domain": list(kinds), "range": colours}, "legend": legend}


def _data(header: Sequence[str], rows: Sequence[Row]) -> Spec:
    texts = ("run", "kind", "mark", "what", "down", "across")
    parse = {name: "number" for name in header if name not in texts}
    if rows and header[:2] == ("across", "down"):
        parse |= {name: "number" for name, cell in zip(header, rows[0], strict=True) if not isinstance(cell, str)}
    data = {"values": as_csv(header, rows), "format": {"type": "csv", "parse": parse}}
    return {"$schema": SCHEMA, "data": data, "config": CONFIG}
