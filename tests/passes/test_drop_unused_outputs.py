import pytest

SPEC = "drop-unused-outputs"


def graph(body, *, inputs="float[1,2,6,6] x", outputs="float y", opset=17, constants=""):
    return f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    g ({inputs}) => ({outputs})
    <{constants}>
    {{ {body} }}
    """


def names(node):
    return [v.name for v in node.outputs]


@pytest.mark.parametrize(
    "body",
    [
        "y, i = MaxPool <kernel_shape = [2, 2]> (x)",
        "y, m = Dropout(x)",
        "y, m, s = LayerNormalization(x, w)",
        "y, i, j, c = Unique(x)",
    ],
)
def test_optional_outputs_are_left_out(rewritten, body):
    outputs = "float[k] y" if "Unique" in body else "float[a,b,c,d] y"
    found = rewritten(graph(body, outputs=outputs, constants="float[6] w = {1,2,3,4,5,6}"), SPEC)
    assert names(found.nodes[0]) == ["y"]


def test_outputs_in_between_lose_their_names(rewritten):
    text = graph("y, i, j, z = Unique(x)", outputs="float[k] y, int64[k] z")
    assert names(rewritten(text, SPEC).nodes[0]) == ["y", "", "", "z"]


def test_the_sequence_of_a_recurrent_layer_is_left_out(rewritten):
    text = graph(
        "s, y = GRU <hidden_size = 2> (x, w, r)",
        inputs="float[3,1,2] x, float[1,6,2] w, float[1,6,2] r",
        outputs="float[1,1,2] y",
    )
    assert names(rewritten(text, SPEC).nodes[0]) == ["", "y"]


@pytest.mark.parametrize(
    "body",
    [
        "y, i = MaxPool <kernel_shape = [2, 2]> (x) j = Identity(i)",
        "v, i = TopK(x, two) y = Exp(v)",
        "q, s, z = DynamicQuantizeLinear(x) y = Cast <to = 1> (q)",
    ],
    ids=["used", "TopK has both", "all are needed"],
)
def test_other_outputs_stay(rewritten, body):
    outputs = "float[a,b,c,d] y" + (", int64[e,f,g,h] j" if "j =" in body else "")
    assert not rewritten(graph(body, outputs=outputs, constants="int64[1] two = {2}"), SPEC).edits


def test_a_batch_normalization_keeps_the_outputs_that_say_it_is_training(rewritten):
    text = graph(
        "y, m, v = BatchNormalization <training_mode = 1> (x, w, w, w, w)",
        outputs="float[a,b,c,d] y",
        constants="float[2] w = {1, 2}",
    )
    assert not rewritten(text, SPEC, verify=False).edits


def test_an_if_computes_only_what_is_used(rewritten):
    text = graph(
        """a, b, c = If (p) <
            then_branch = t () => (float[2] t1, float[2] t2, float[2] t3) { t1 = Exp(x) t2 = Neg(x) t3 = Abs(x) },
            else_branch = e () => (float[2] e1, float[2] e2, float[2] e3) { e1 = Sin(x) e2 = Cos(x) e3 = Tan(x) }
        > y = Relu(a)""",
        inputs="float[2] x, bool p",
        outputs="float[2] y, float[2] c",
    )
    found = rewritten(text, f"{SPEC},remove-dead-code")
    assert found.ops == {"If": 1, "Exp": 1, "Abs": 1, "Sin": 1, "Tan": 1, "Relu": 1}
    assert names(found.nodes[0]) == ["a", "c"]


def test_a_loop_collects_only_what_is_used(rewritten):
    text = graph(
        """a, b, c = Loop (n, , x) <
            body = l (int64 i, bool k, float[2] s) => (bool o, float[2] t, float[2] u, float[2] v) {
                o = Identity(k) t = Exp(s) u = Sin(s) v = Cos(s)
            }
        > y = Relu(c)""",
        inputs="float[2] x, int64 n",
        outputs="float[m,2] y",
    )
    found = rewritten(text, f"{SPEC},remove-dead-code")
    assert found.ops == {"Loop": 1, "Identity": 1, "Exp": 1, "Cos": 1, "Relu": 1}
    assert names(found.nodes[0]) == ["a", "c"], "the state stays"


@pytest.mark.parametrize(
    ("split", "opset", "part"),
    [
        ("p, q, r = Split <axis = 2, split = [1, 2, 3]> (x)", 9, "q"),
        ("p, q, r = Split <axis = 2, split = [1, 2, 3]> (x)", 12, "r"),
        ("p, q, r = Split <axis = -1> (x, sizes)", 17, "q"),
        ("p, q, r = Split <axis = 3> (x)", 17, "p"),
    ],
)
def test_one_part_of_a_split_is_a_slice(rewritten, split, opset, part):
    text = graph(
        f"{split} y = Exp({part})", outputs="float[a,b,c,d] y", opset=opset, constants="int64[3] sizes = {1, 2, 3}"
    )
    assert rewritten(text, SPEC).ops == {"Slice": 1, "Exp": 1}


@pytest.mark.parametrize("used", ["p, q", "q, r"])
def test_more_parts_stay_a_split(rewritten, used):
    text = graph(f"p, q, r = Split <axis = 3> (x) y = Concat <axis = 0> ({used})", outputs="float[a,b,c,d] y")
    assert not rewritten(text, SPEC).edits


def test_equal_parts_of_an_unknown_size_stay_a_split(rewritten):
    text = graph("p, q = Split <axis = 0> (x) y = Exp(q)", inputs="float[n,2] x", outputs="float[m,2] y")
    assert not rewritten(text, SPEC).edits
