"""
Figures as SVG that belongs to the page around it: searchable text in the page's font, colours that follow its theme.

matplotlib is given a placeholder for each role that a colour plays; in the SVG, the placeholders become the page's CSS
variables, which are set once for light and once for dark.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROLES = ("text", "muted", "grid", "weight", "activation", "mixed", "uniform", "other")
_NAMESPACES = {"": "http://www.w3.org/2000/svg", "xlink": "http://www.w3.org/1999/xlink"}
_ID = re.compile(r"url\(#([^)]+)\)")
_COLOUR = re.compile(r"#0000([0-9a-f]{2})|#0001([0-9a-f]{2})")
_TIP = "tip:"


def colour(role: str) -> str:
    """:return: the placeholder of a role, one of :data:`ROLES`."""
    return f"#0000{ROLES.index(role) + 1:02x}"  # matplotlib does not write #000000


def depth_colour(share: float) -> str:
    """:return: the placeholder of a place in the network, 0 for its input and 1 for its output."""
    return f"#0001{round(100 * share):02x}"


def tip(text: str) -> str:
    """:return: a ``gid`` for an artist, which becomes the text shown when the pointer rests on it."""
    return _TIP + text


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for the page's figures, whatever the user's own are."""
    import matplotlib

    text, grid = colour("text"), colour("grid")
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "nncf-mpq",
        "font.size": 10,
        "text.color": text,
        "text.parse_math": False,
        "axes.edgecolor": colour("muted"),
        "axes.labelcolor": text,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": grid,
        "grid.linewidth": 0.8,
        "xtick.color": colour("muted"),
        "ytick.color": colour("muted"),
        "xtick.labelcolor": text,
        "ytick.labelcolor": text,
        "figure.facecolor": "none",
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "hatch.color": colour("muted"),
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def to_svg(figure: Figure, name: str, title: str) -> str:
    """
    :param figure: drawn with :func:`style`.
    :param name: what the ids of its elements begin with; unique on the page.
    :param title: what it shows, for those who cannot see it.
    :return: an ``<svg>`` element.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ET.fromstring(buffer.getvalue().decode())
    names = {element.get("id", ""): f"{name}-{index}" for index, element in enumerate(root.iter()) if element.get("id")}
    for element in root.iter():
        _adapt(element, names)
    for metadata in root.findall("metadata", _NAMESPACES):
        root.remove(metadata)
    width, height = (float(root.attrib.pop(side).removesuffix("pt")) for side in ("width", "height"))
    root.attrib.update({"role": "img", "aria-label": title, "style": f"--width: {width:.0f}; --height: {height:.0f}"})
    for prefix, uri in _NAMESPACES.items():
        ET.register_namespace(prefix, uri)
    return ET.tostring(root, encoding="unicode")


def _adapt(element: ET.Element, names: Mapping[str, str]) -> None:
    own = element.get("id", "")
    if own:
        element.set("id", names[own])
    if own.startswith(_TIP):
        title = ET.Element(f"{{{_NAMESPACES['']}}}title")
        title.text = own.removeprefix(_TIP)
        element.insert(0, title)
        element.set("class", "tip")
    for key, value in element.attrib.items():
        if key.endswith("href"):
            element.set(key, f"#{names[value.removeprefix('#')]}")
        elif key in ("style", "fill", "stroke", "clip-path"):
            value = _ID.sub(lambda match: f"url(#{names[match[1]]})", value)
            value = re.sub(r"(font-family|font): [^;]*(;|$)", _font, value)
            element.set(key, _COLOUR.sub(_variable, value))
    if element.tag.endswith("style") and element.text:
        element.text = None  # matplotlib's defaults for joins and caps would hold for the whole page


def _variable(match: re.Match[str]) -> str:
    if match[1] is not None:
        return f"var(--{ROLES[int(match[1], 16) - 1]})"
    return f"color-mix(in oklab, var(--late) {int(match[2], 16)}%, var(--early))"


def _font(match: re.Match[str]) -> str:
    """Keep a font's size and leave the family to the page."""
    size = re.search(r"[\d.]+px", match[0])
    return f"font-size: {size[0]};" if size else ""
