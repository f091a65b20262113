"""Turns what ONNX Runtime says into one sentence: its error codes, C++ signatures and file names left out."""

from __future__ import annotations

import re

_CODE = re.compile(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
_SOURCE = re.compile(r"(?:/\S+/)?\w+\.(?:cc|h|hpp|cpp|cu|cuh|mm):\d+ ")
_ENFORCED = re.compile(r".* was false\.\s*(?=\S)", re.DOTALL)
_SIGNATURE = re.compile(
    r"^[^()]*::[^()]*\((?:[^()]|\([^()]*\))*\)(?:::<lambda\([^()]*\)>)?(?: const)?(?: \[with [^\]]*\])?\s*",
    re.DOTALL,
)
_FUNCTION = re.compile(r"^~?[A-Z]\w+ (?=[A-Z])")

_NO_KERNEL = re.compile(
    r"(?:Could not find an implementation|Failed to find kernel) for ([\w.:-]+)\((\d+)\) "
    r"(?:node with name |\(node:)'([^']*)'"
)
_UNKNOWN_OP = re.compile(
    r'In Node, \("(?P<node>[^"]*)", (?P<op>[\w.]+), "(?P<domain>[^"]*)".*No Op registered for', re.DOTALL
)
_UNKNOWN_FUNCTION = re.compile(r"Fatal error: ([\w.-]*):(\w+)\(-?\d+\) is not a registered function/op")
_INVALID_NODE = re.compile(r'In Node, \("(?P<node>[^"]*)", (?P<op>[\w.]+),.*?, Error (?P<why>.*)', re.DOTALL)
_FAILED_NODE = re.compile(
    r"Non-zero status code returned while running (?P<op>[\w.]+) node\. "
    r"Name:'(?P<node>[^']*)' Status Message: (?P<why>.*)",
    re.DOTALL,
)
_WRONG_RANK = re.compile(r"Invalid rank for input: (?P<name>.+?) Got: (?P<got>\d+) Expected: (?P<want>\d+)")
_WRONG_SIZE = re.compile(
    r"Got invalid dimensions for input: (?P<name>.+?) for the following indices\s+"
    r"index: (?P<axis>\d+) Got: (?P<got>-?\d+) Expected: (?P<want>-?\d+)"
)
_WRONG_TYPE = re.compile(r"Unexpected input data type\. Actual: \((?P<got>.+?)\) , expected: \((?P<want>.+?)\)$")


def missing_kernel(message: str) -> tuple[str, str, str] | None:
    """Return (operator, version, node name) when the message says that an operator has no kernel."""
    found = _NO_KERNEL.search(message)
    return (found[1], found[2], found[3]) if found else None


def sentence(message: str) -> str:
    """Return what an error message of ONNX Runtime says, as one sentence."""
    if found := missing_kernel(message):
        op, version, node = found
        return f"there is no kernel for {op} (version {version}){_of(node)}."
    if match := _UNKNOWN_OP.search(message):
        return f"{_operator(match['op'], match['domain'])}{_of(match['node'])} is not known in this opset."
    if match := _UNKNOWN_FUNCTION.search(message):
        return (
            f"{_operator(match[2], match[1])} is neither a known operator nor a function of the model; a library "
            "that has it can be registered with --custom-ops."
        )
    if match := _FAILED_NODE.search(message):
        return f"{match['op']}{_of(match['node'])} failed: {sentence(match['why'])}"
    if match := _INVALID_NODE.search(message):
        return f"{match['op']}{_of(match['node'])} is invalid: {_clean(match['why'])}"
    return _about_inputs(message) or _clean(message)


def _about_inputs(message: str) -> str | None:
    if match := _WRONG_RANK.search(message):
        return f'input "{match["name"]}" has {match["got"]} dimensions, but {match["want"]} are expected.'
    if match := _WRONG_SIZE.search(message):
        return (
            f'input "{match["name"]}" has size {match["got"]} along axis {match["axis"]}, '
            f"but {match['want']} is expected."
        )
    if match := _WRONG_TYPE.search(_flat(message)):
        return f"an input is a {match['got']}, but a {match['want']} is expected."
    return None


def _operator(op: str, domain: str) -> str:
    return f"{op} of the domain {domain}" if domain else op


def _of(node: str) -> str:
    return f' (node "{node}")' if node else ""


def _flat(text: str) -> str:
    return " ".join(text.split())


def _clean(message: str) -> str:
    """Drop error codes, source locations, C++ signatures and the condition that an assertion spells out."""
    text = _flat(_CODE.sub("", message))
    pieces = _SOURCE.split(text)
    if len(pieces) > 1:
        said = [pieces[0].strip(), *(_without_signature(piece) for piece in pieces[1:])]
        text = " ".join(piece for piece in said if piece)
    text = text.replace("Please fix either the inputs/outputs or the model.", "").strip(" ,:")
    text = _flat(text) or "ONNX Runtime gave no reason"
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _without_signature(piece: str) -> str:
    """Strip the function that follows a source location, and "x was false." when a reason stands behind it."""
    shorter = _SIGNATURE.sub("", piece, count=1)
    shorter = _ENFORCED.sub("", shorter, count=1)
    return _FUNCTION.sub("", shorter, count=1).strip()
