"""How a report says things: plurals, sizes, times, changes, and names that come from strangers.

Every form of the report uses these, so that the terminal, the page and the exit message agree.
"""

from __future__ import annotations

import math
import unicodedata

_BYTE_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that a name is not shown with as is: controls, bidirectional overrides, line breaks."""


def count(number: int, noun: str, plural: str = "") -> str:
    """Return e.g. "1 edit", "1,234 edits"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def printable(text: str) -> str:
    r"""Return a name as it can safely be shown: control characters become escapes such as `\x1b`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if unicodedata.category(c) in _HIDDEN else c for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def fold(text: str, width: int) -> str:
    """Shorten a long name in its middle, so that it takes at most `width` characters (at least 5)."""
    text, width = printable(text), max(width, 5)
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def fold_words(text: str, width: int) -> str:
    """Shorten the words of a text that are longer than `width` characters in their middle."""
    return " ".join(fold(word, width) for word in text.split(" "))


def size(number: float, unit: str = "") -> str:
    """Return a number of bytes with three significant digits, in decimal units, e.g. "1.85 MB"."""
    unit = unit or _byte_unit(number)
    if unit == "bytes":
        return count(int(number), "byte")
    return f"{_byte_number(number, unit)} {unit}"


def sizes(before: float, after: float) -> str:
    """Return two sizes in one unit, e.g. "1.85 -> 0.47 MB"."""
    unit = _byte_unit(max(before, after))
    return f"{_byte_number(before, unit)} -> {_byte_number(after, unit)} {unit}"


def _byte_unit(number: float) -> str:
    step = 0
    while step + 1 < len(_BYTE_UNITS) and abs(number) >= 999.5 * 1000**step:
        step += 1
    return _BYTE_UNITS[step]


def _byte_number(number: float, unit: str) -> str:
    return digits(number / 1000 ** _BYTE_UNITS.index(unit)) if unit != "bytes" else f"{int(number):,}"


def digits(number: float) -> str:
    """Return a number of everyday size with three significant digits and thousands separators."""
    if not math.isfinite(number):
        return deviation(number)
    if number == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(number))))
    rounded = round(number, places)
    if rounded and math.floor(math.log10(abs(rounded))) > math.floor(math.log10(abs(number))):
        places = max(0, places - 1)  # 9.996 is 10.0, not 10.00
    return f"{rounded:,.{places}f}" if places <= 6 else f"{number:.2e}"


def deviation(number: float) -> str:
    """Return a deviation, e.g. "2.1e-07"; exactly zero is "0"."""
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "infinite" if number > 0 else "-infinite"
    return f"{number:.1e}" if number else "0"


def duration(seconds: float) -> str:
    """Return a wall time, e.g. "<1 ms", "12 ms", "1.24 s", "2 min 05 s"."""
    if seconds < 0.0005:
        return "<1 ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.995:
        return f"{digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest:02d} s"


def milliseconds(number: float) -> str:
    """Return a latency given in milliseconds, e.g. "0.213 ms", "1,240 ms"."""
    return f"{digits(number)} ms"


def change(before: float, after: float) -> str:
    """Return a relative change, e.g. "-25.0%", "unchanged"."""
    if before == after:
        return "unchanged"
    if not before:
        return ""
    percent = (after / before - 1) * 100
    if abs(percent) < 0.001:
        return "under 0.001%"
    return f"{percent:+,.1f}%" if abs(percent) >= 0.05 else f"{percent:+.3f}%"


def share(part: float) -> str:
    """Return a part of something as a percentage, e.g. "12.3%", "<0.1%", "0%", ">999%"."""
    if part == 0 or math.isnan(part):
        return "0%" if part == 0 else "NaN"
    if part >= 9.995:
        return ">999%"
    return "<0.1%" if 0 < part < 0.0005 else f"{part:,.1%}"


def saved(part: float) -> str:
    """Return what something is smaller by, as a change in percent, e.g. "-12.3%"; "<0.1%" for less."""
    if abs(part) < 0.0005:
        return share(abs(part))
    return f"-{share(part)}" if part > 0 else f"+{share(-part)}"


def factor(ratio: float) -> str:
    """Return a factor such as "1.12x", with two decimals, or three digits when it is large."""
    return f"{digits(ratio)}x" if ratio >= 10 else f"{ratio:.2f}x"


def sentence(text: str) -> str:
    """Return text as one printable sentence on one line, ending with a full stop."""
    text = printable(" ".join(text.split()))
    return text if not text or text[-1] in ".!?" else f"{text}."
