import numpy as np
import onnx
import pytest

SPEC = "share-layout"


def model(body, *, inputs="float[2,n,12] x", outputs="float q, float k, float v", opset=17, **arrays):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for output in proto.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return proto


def heads(*perms, shapes="sss", split="a, b, c = Split <axis = -1> (x, z)"):
    """Parts of a split that become heads, each transposed its own way; none where there is no perm."""
    parts = []
    for part, out, shape, perm in zip("abc", "qkv", shapes, perms, strict=True):
        if perm is None:
            parts.append(f"{out} = Neg({part})")
        else:
            parts.append(f"r{part} = Reshape({part}, {shape}) {out} = Transpose <perm = {list(perm)}> (r{part})")
    return f"{split} {' '.join(parts)}"


SIZES = {"z": np.array([4, 4, 4]), "s": np.array([0, 0, 2, 2])}
HEADS = (0, 2, 1, 3)


def test_heads(rewritten):
    found = rewritten(model(heads(HEADS, HEADS, HEADS), **SIZES), SPEC)
    assert found.ops == {"Reshape": 1, "Transpose": 1, "Split": 1}


def test_a_key_that_is_transposed_besides(rewritten):
    found = rewritten(model(heads(HEADS, (0, 2, 3, 1), HEADS), **SIZES), SPEC)
    assert found.ops == {"Reshape": 1, "Transpose": 2, "Split": 1}


def test_heads_of_different_number(rewritten):
    sizes = {"z": np.array([8, 2, 2]), "s": np.array([0, 0, 4, 2]), "t": np.array([0, 0, 1, 2])}
    found = rewritten(model(heads(HEADS, HEADS, HEADS, shapes="stt"), **sizes), SPEC)
    split = next(n for n in found.nodes if n.op_type == "Split")
    assert split.inputs[1].const_value.numpy().tolist() == [4, 1, 1]


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_equal_parts(rewritten, opset):
    counted = ", num_outputs = 3" if opset >= 18 else ""
    body = heads(HEADS, HEADS, HEADS, split=f"a, b, c = Split <axis = 2{counted}> (x)")
    found = rewritten(model(body, opset=opset, s=SIZES["s"]), SPEC)
    assert found.ops == {"Reshape": 1, "Transpose": 1, "Split": 1}


def test_a_part_that_stays_as_it_is(rewritten):
    """Undoing the layout for one part costs as much as sharing it saves."""
    found = rewritten(model(heads(HEADS, HEADS, None), **SIZES), SPEC)
    assert found.edits == 0


def test_parts_that_are_transposed_differently_share_their_shape(rewritten):
    found = rewritten(model(heads(HEADS, (0, 1, 3, 2), (1, 0, 2, 3)), **SIZES), SPEC)
    assert found.ops == {"Reshape": 1, "Transpose": 3, "Split": 1}


def test_parts_of_different_shape_stay(rewritten):
    found = rewritten(model(heads(HEADS, HEADS, HEADS, shapes="ssu"), **SIZES, u=np.array([0, 0, 4, 1])), SPEC)
    assert found.edits == 0
    assert found.refusals == {"the parts are not rearranged alike"}


def test_one_head_for_key_and_value(rewritten):
    sizes = {"z": np.array([8, 2, 2]), "s": np.array([0, 0, 4, 2]), "t": np.array([0, 0, 1, 2])}
    found = rewritten(model(heads(HEADS, (0, 2, 3, 1), HEADS, shapes="stt"), **sizes), SPEC)
    assert found.ops == {"Reshape": 1, "Transpose": 2, "Split": 1}


def test_more_uses_stay(rewritten):
    body = heads(HEADS, HEADS, HEADS) + " w = Neg(a) y = Neg(b)"
    found = rewritten(model(body, outputs="float q, float k, float v, float w, float y", **SIZES), SPEC)
    assert found.edits == 0


def test_two_parts_along_the_batch(rewritten):
    body = "a, b = Split <axis = 0> (x, z) q = Transpose <perm = [0, 2, 1]> (a) k = Transpose <perm = [0, 2, 1]> (b)"
    found = rewritten(model(body, outputs="float q, float k", z=np.array([1, 1])), SPEC)
    assert found.ops == {"Transpose": 1, "Split": 1}


# One Gather per element ---------------------------------------------------------------------------------------

PICKS = "q = Gather <axis = {0}> (t, zero) k = Gather <axis = {0}> (t, one) v = Gather <axis = {0}> (t, two)"
INDICES = {"zero": np.int64(0), "one": np.int64(1), "two": np.int64(-1)}


def test_gathers_of_joint_heads(rewritten):
    body = "r = Reshape(x, s) t = Transpose <perm = [2, 0, 3, 1, 4]> (r) " + PICKS.format(0)
    found = rewritten(model(body, s=np.array([0, -1, 3, 2, 2]), **INDICES), SPEC)
    assert found.ops == {"Reshape": 1, "Transpose": 1, "Split": 1}


@pytest.mark.parametrize(
    ("body", "given"),
    [
        ("t = Transpose <perm = [2, 0, 1]> (x) q = Gather(t, zero) k = Gather(t, one)", {}),
        ("r = Reshape(x, s) t = Transpose <perm = [2, 0, 3, 1, 4]> (r) q = Gather(t, zero) k = Gather(t, one)", {}),
        ("r = Reshape(x, s) t = Transpose <perm = [2, 0, 3, 1, 4]> (r) q = Gather(t, zero) k = Gather(t, one) v = Neg(t)", {}),
        ("r = Reshape(x, s) t = Transpose <perm = [2, 0, 3, 1, 4]> (r) q = Gather(t, zero) k = Gather(t, one) v = Gather(t, one)", {}),
        ("r = Reshape(x, s) t = Transpose <perm = [2, 0, 3, 1, 4]> (r) q = Gather(t, zero) k = Gather(t, one) v = Gather(t, two)",
         {"two": np.array([2])}),
    ],
)  # fmt: skip
def test_gathers_that_stay(rewritten, body, given):
    outputs = "float q, float k" + (", float v" if " v =" in body else "")
    proto = model(body, outputs=outputs, **{"s": np.array([0, -1, 3, 2, 2])} | INDICES | given)
    assert rewritten(proto, SPEC).edits == 0


# One Slice per part -------------------------------------------------------------------------------------------


def slices(*bounds, axis=2):
    return (
        {f"s{i}": np.array([start]) for i, (start, _) in enumerate(bounds)}
        | {f"e{i}": np.array([end]) for i, (_, end) in enumerate(bounds)}
        | {"axis": np.array([axis])}
    )


TWO = "a = Relu(x) q = Slice(a, s0, e0, axis) k = Slice(a, s1, e1, axis) v = Neg(a)"


@pytest.mark.parametrize(
    "bounds", [((0, 6), (6, 12)), ((0, -8), (4, 2**63 - 1)), ((3, 12), (0, 3)), ((-12, 5), (-7, 99))]
)
def test_slices(rewritten, bounds):
    found = rewritten(model(TWO, **slices(*bounds)), SPEC)
    assert found.ops == {"Relu": 1, "Split": 1, "Neg": 1}


def test_slices_as_attributes(rewritten):
    body = """a = Relu(x) q = Slice <starts = [0], ends = [6], axes = [2]> (a)
        k = Slice <starts = [6], ends = [12], axes = [2]> (a) v = Neg(a)"""
    assert rewritten(model(body, opset=9), SPEC).ops == {"Relu": 1, "Split": 1, "Neg": 1}


@pytest.mark.parametrize("bounds", [((0, 6), (5, 12)), ((0, 6), (6, 11)), ((1, 6), (6, 12)), ((0, 12), (0, 12))])
def test_slices_that_leave_gaps_or_overlap_stay(rewritten, bounds):
    assert rewritten(model(TWO, **slices(*bounds)), SPEC).edits == 0


def test_slices_of_unknown_size_or_with_steps_stay(rewritten):
    assert rewritten(model(TWO, **slices((0, 1), (1, 2**40), axis=1)), SPEC).edits == 0
    body = TWO.replace("axis)", "axis, step)")
    assert rewritten(model(body, step=np.array([2]), **slices((0, 6), (6, 12))), SPEC).edits == 0


def test_nested_graphs(rewritten):
    body = """a = Relu(x) y = If (p) <
        then_branch = t () => (float[2,n,6] u) { q = Slice(a, s0, e0, axis) k = Slice(a, s1, e1, axis) u = Add(q, k) },
        else_branch = e () => (float[2,n,6] w) { b = Neg(a) l = Slice(b, s0, e0, axis) m = Slice(b, s1, e1, axis) w = Add(l, m) }>"""
    proto = model(body, inputs="float[2,n,12] x, bool p", outputs="float y", **slices((0, 6), (6, 12)))
    found = rewritten(proto, SPEC)
    assert found.ops == {"Relu": 1, "If": 1, "Slice": 2, "Add": 2, "Neg": 1, "Split": 1}


# One element of a sequence per part ---------------------------------------------------------------------------

PARTS = "q = SequenceAt(t, zero) k = SequenceAt(t, one) v = SequenceAt(t, two)"


@pytest.mark.parametrize("sizes", [np.int64(4), np.int64(5), np.array([2, 4, 6])])
@pytest.mark.parametrize("opset", [11, 18])
def test_a_sequence(rewritten, sizes, opset):
    found = rewritten(model(f"t = SplitToSequence <axis = 2> (x, z) {PARTS}", opset=opset, z=sizes, **INDICES), SPEC)
    assert found.ops == {"Split": 1}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("t = SplitToSequence <axis = 2> (x, z) q = SequenceAt(t, zero) k = SequenceAt(t, one) v = Neg(q)", "not every part"),
        ("t = SplitToSequence <axis = 1> (x, z) q = SequenceAt(t, zero) k = SequenceAt(t, one) v = Neg(q)", "not known"),
        ("t = SplitToSequence <axis = 2> (x) q = SequenceAt(t, zero) k = SequenceAt(t, one) v = Neg(q)", "not known"),
        ("t = SplitToSequence <axis = 2> (x, z) q = SequenceAt(t, zero) k = Cast <to = 1> (l) l = SequenceLength(t) v = Neg(q)",
         "used as such"),
    ],
)  # fmt: skip
def test_sequences_that_stay(rewritten, body, reason):
    if "l = " in body:
        body = body.replace(
            "k = Cast <to = 1> (l) l = SequenceLength(t)", "l = SequenceLength(t) k = Cast <to = 1> (l)"
        )
    found = rewritten(model(body, z=np.int64(4), **INDICES), SPEC, verify="axis = 1" not in body)
    assert found.edits == 0
    assert any(reason in r for r in found.refusals), found.refusals
