"""The placement rules on hand-made graphs."""

from nncf_mpq_plugin.adapters.plan import ADD, CONCAT, FLOAT, OTHER, TRANSPARENT, WEIGHTED, Op, Position, make_plan


def post(op: str) -> Position:
    return Position("post", op, 0)


def pre(op: str, port: int = 0) -> Position:
    return Position("pre", op, port)


def reads(*names: str) -> dict[int, tuple[str, int]]:
    return {port: (name, 0) for port, name in enumerate(names)}


RESIDUAL = [
    Op("x", OTHER, {}),
    Op("stem", WEIGHTED, reads("x"), linear_output=True),
    Op("relu", OTHER, reads("stem")),
    Op("conv1", WEIGHTED, reads("relu"), linear_output=True),
    Op("relu1", OTHER, reads("conv1")),
    Op("conv2", WEIGHTED, reads("relu1"), linear_output=True),
    Op("add", ADD, reads("conv2", "relu")),
    Op("out", OTHER, reads("add")),
]
QUANTIZED = {post("x"): True, post("relu"): False, post("relu1"): False, post("conv2"): True}


def test_residual_input_is_stored_and_read_through_a_quantizer_of_its_own():
    plan = make_plan(RESIDUAL, QUANTIZED, {"stem": 8})
    assert [tensor.position for tensor in plan.stored] == [post("relu")]
    readers = {reader.layers: reader for reader in plan.readers}
    assert readers["conv1",].positions == (pre("conv1"),)
    assert readers["conv1",].stored == post("relu")
    assert readers["conv2",].positions == (post("relu1"),)
    assert readers["conv2",].stored is None
    assert readers["stem",].bits == 8


def test_branch_before_an_addition_is_not_quantized_for_openvino():
    assert make_plan(RESIDUAL, QUANTIZED, {}).dropped == (post("conv2"),)


def test_branch_before_an_addition_is_stored_for_onnxruntime():
    plan = make_plan(RESIDUAL, QUANTIZED, {}, "onnxruntime")
    assert not plan.dropped
    assert post("conv2") in {tensor.position for tensor in plan.stored}


def test_layers_that_read_one_tensor_form_one_group():
    ops = [
        Op("x", OTHER, {}),
        Op("pool", TRANSPARENT, reads("x")),
        Op("left", WEIGHTED, reads("pool")),
        Op("right", WEIGHTED, reads("x")),
    ]
    plan = make_plan(ops, {post("x"): False}, {})
    assert [reader.layers for reader in plan.readers] == [("left", "right")]
    assert plan.readers[0].positions == (post("x"),)
    assert not plan.stored


def test_fixed_reader_beside_searched_one_reads_the_stored_tensor():
    ops = [Op("x", OTHER, {}), Op("a", WEIGHTED, reads("x")), Op("b", WEIGHTED, reads("x"))]
    plan = make_plan(ops, {post("x"): False}, {"a": 8})
    readers = {reader.layers: reader for reader in plan.readers}
    assert readers["a",].positions == ()
    assert readers["a",].stored == post("x")
    assert readers["b",].positions == (pre("b"),)


def test_concatenation_is_quantized_once_behind_it():
    ops = [
        Op("a", OTHER, {}),
        Op("b", OTHER, {}),
        Op("cat", CONCAT, reads("a", "b")),
        Op("conv", WEIGHTED, reads("cat")),
    ]
    plan = make_plan(ops, {post("a"): False, post("b"): True}, {})
    assert plan.readers[0].positions == (post("cat"),)
    assert plan.readers[0].signed
    assert set(plan.dropped) == {post("a"), post("b")}


def test_concatenation_with_an_unquantized_branch_is_left_alone():
    ops = [
        Op("a", OTHER, {}),
        Op("b", OTHER, {}),
        Op("cat", CONCAT, reads("a", "b")),
        Op("conv", WEIGHTED, reads("cat")),
    ]
    assert not make_plan(ops, {post("a"): False}, {}).readers


def test_normalisation_input_and_constants_stay_in_floating_point():
    ops = [Op("a", OTHER, {}), Op("norm", FLOAT, reads("a")), Op("add", ADD, reads("a", "norm"))]
    plan = make_plan(ops, {post("a"): True, pre("norm", 2): False}, {})
    assert not plan.stored
    assert set(plan.dropped) == {post("a"), pre("norm", 2)}
