from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from onnxopt.probe.validation import Step
from onnxopt.report.curve import Line, picture, standalone

RISING = [Step(n, a, a - 0.1, min(1.0, a + 0.1), 20) for n, a in ((1, 0.5), (5, 0.8), (100, 0.95))]


def places(text: str, css: str) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(text)
    circles = [c for g in root.iter() if g.get("class") == css for c in g.iter() if c.tag.endswith("circle")]
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in circles]


def test_more_right_answers_stand_higher_and_more_samples_further_right() -> None:
    drawn = places(picture([Line("head", RISING, "better")], guessing=0.2), "better")
    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)
    assert [y for _, y in drawn] == sorted((y for _, y in drawn), reverse=True)


def test_all_lines_and_the_figures_are_in_the_description() -> None:
    text = picture([Line("head", RISING, "better"), Line("scratch", RISING[-1:], "worse")], guessing=0.2)
    assert "head 50.0% at 1, 80.0% at 5, 95.0% at 100; scratch 95.0% at 100" in text
    assert "guessing" in text


def test_one_point_alone_is_drawn() -> None:
    ((x, y),) = places(picture([Line("head", RISING[:1], "better")], guessing=0.2), "better")
    assert 0 < x < 640
    assert 0 < y < 320


def test_a_picture_of_its_own_is_well_formed_and_brings_its_style() -> None:
    root = ElementTree.fromstring(standalone(picture([Line("<b>", RISING, "better")], guessing=0.2)))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.find("{http://www.w3.org/2000/svg}style") is not None
    assert "<b>" in root.attrib["aria-label"]
