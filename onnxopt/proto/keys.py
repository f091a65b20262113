"""What of a file the IR has no place for, and under which key of `graph.meta` it is kept."""

from __future__ import annotations

INPUT_ORDER = "onnxopt.input_order"
"""Names of a graph's inputs in the file, initializers among them (IR version 3 and older)."""
VALUE_INFO_ORDER = "onnxopt.value_info_order"
"""Names that had an entry in `value_info`, in the order of the file."""
TYPES = "onnxopt.types"
"""Name -> TypeProto for the types that the IR cannot express."""
FUNCTION_VALUE_INFO = "onnxopt.function_value_info"
"""Entries of `value_info` that describe values of functions (a custom of IR version 9 and older)."""
HAD_EXTERNAL_DATA = "onnxopt.had_external_data"
"""True when some of the model's data was in data files."""
TRAINING_INFO = "onnxopt.training_info"
"""The model's `training_info`, as it is in the file."""
ANNOTATIONS = "onnxopt.annotations"
"""Name -> quantization annotation of the value."""

FIRST_IR_WITH_CONSTANTS = 4
"""Before this IR version every initializer had to be a graph input too; since then such an input is a default."""
