import pytest

SPEC = "unroll-loops"


def loop(*, trips="3", go="yes", keep="o = Identity(k)", work="t = Mul(s, w) q = Neg(t)", opset=17, extra=""):
    """A Loop that scales its state and collects what each round gives."""
    return f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    g (float[2] x, bool given, int64 count) => (float[2] y, float[n,2] z)
    <bool yes = {{1}}, int64 trips = {{{trips}}}, int64[3] three = {{1, 2, 3}}>
    {{
        {extra}
        y, z = Loop ({"m" if extra else "trips"}, {go}, x) <
            body = b (int64 i, bool k, float[2] s) => (bool o, float[2] t, float[2] q) <float[2] w = {{2, 3}}> {{
                {keep}
                {work}
            }}
        >
    }}
    """


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_rounds_stand_one_after_the_other(rewritten, opset):
    found = rewritten(loop(opset=opset), SPEC)
    assert found.ops == {"Identity": 3, "Mul": 3, "Neg": 3, "Unsqueeze": 3, "Concat": 1}
    assert [v.name for v in found.model.graph.outputs] == ["y", "z"]
    weights = [v for v in found.model.graph.initializers.values() if v.shape == [2]]
    assert len(weights) == 1, "the rounds share the constants of the body"


def test_the_number_of_the_round_is_a_constant(rewritten):
    work = "f = Cast <to = 1> (i) t = Add(s, f) q = Neg(t)"
    found = rewritten(loop(work=work), "unroll-loops,fold-constants,remove-dead-code,remove-identities")
    assert "Cast" not in found.ops
    assert found.ops["Neg"] == 3


def test_one_round_needs_no_concat(rewritten):
    assert rewritten(loop(trips="1"), SPEC).ops == {"Identity": 1, "Mul": 1, "Neg": 1, "Unsqueeze": 1}


def test_the_trip_count_may_follow_from_shapes(rewritten):
    found = rewritten(loop(extra="m = Size(three)"), SPEC)
    assert "Loop" not in found.ops
    assert found.ops["Mul"] == 3


@pytest.mark.parametrize(
    "keep", ["o = Identity(k)", "a = Identity(k) o = Identity(a)", "o = Constant <value = bool {1}> ()"]
)
def test_conditions_that_never_end_it(rewritten, keep):
    assert "Loop" not in rewritten(loop(keep=keep), SPEC).ops


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": "e = ReduceSum <keepdims = 0> (s) o = GreaterOrEqual(e, e)"}, "its body may end it early"),
        ({"trips": "9"}, "it runs more than max_rounds rounds"),
        (
            {"trips": "8", "work": "a = Mul(s, w) c = Exp(a) d = Abs(c) t = Sqrt(d) q = Neg(t)"},
            "its rounds together have more than max_nodes nodes",
        ),
        ({"trips": "0"}, "it runs no round, and the shape of what it collects is not known"),
        (
            {"work": "r = RandomUniformLike(s) t = Add(s, r) q = Neg(t)"},
            "its body draws random numbers, which would repeat",
        ),
    ],
)
def test_refusals(rewritten, options, reason):
    found = rewritten(loop(**options), SPEC)
    assert found.ops["Loop"] == 1
    assert found.refusals == {reason}


@pytest.mark.parametrize("options", [{"go": "given"}, {"extra": "m = Identity(count)"}])
def test_what_the_caller_decides_is_not_known(rewritten, options):
    found = rewritten(loop(**options), SPEC)
    assert found.ops["Loop"] == 1
    assert not found.edits


def test_no_rounds_pass_the_state_on(rewritten):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] y, float[2] a)
    <bool no = {0}>
    {
        z = Loop (, no, x) <
            body = b (int64 i, bool k, float[2] s) => (bool o, float[2] t) { o = Identity(k) t = Neg(s) }
        >
        y = Relu(z)
        a = Loop (, no, y) <
            body = b2 (int64 i2, bool k2, float[2] s2) => (bool o2, float[2] t2) { o2 = Identity(k2) t2 = Neg(s2) }
        >
    }
    """
    found = rewritten(text, SPEC)
    assert found.ops == {"Relu": 1, "Identity": 1}


def test_states_that_swap_and_nested_graphs(rewritten):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x, float[2] u, bool c) => (float[2] y, float[2] v)
    <int64 two = {3}>
    {
        y, v = Loop (two, , x, u) <
            body = b (int64 i, bool k, float[2] s, float[2] r) => (bool o, float[2] r1, float[2] t) {
                o = Identity(k)
                r1 = Exp(r)
                t = If (c) <
                    then_branch = a () => (float[2] p) { h = Neg(s) p = Add(h, u) },
                    else_branch = e () => (float[2] p2) { p2 = Sub(s, r1) }
                >
            }
        >
    }
    """
    assert rewritten(text, SPEC).ops == {"Identity": 3, "Exp": 3, "If": 3, "Neg": 3, "Add": 3, "Sub": 3}
