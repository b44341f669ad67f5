"""What a program needs, against programs whose needs are known."""

import jax
import jax.numpy as jnp
import pytest

from t2i_jax import errors
from t2i_jax.commands import plan

X = jax.ShapeDtypeStruct((32, 64), jnp.float32)
W = jax.ShapeDtypeStruct((64, 64), jnp.float32)
PRODUCT = 2 * 32 * 64 * 64

TEXT = """\
HloModule jit_update, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %r = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %start = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x), dimensions={0}
  %busy = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %done = bf16[8,4]{1,0} all-gather-done(%start)
  %all = f32[10]{0} all-reduce(%y), to_apply=%sum
}

ENTRY %main (p0: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %late = (f32[2]{0}, f32[8]{0}) all-gather-start(%z), dimensions={0}
  %done2 = f32[8]{0} all-gather-done(%late)
}
"""


def count(fn, *args):
    return plan.flops(jax.make_jaxpr(fn)(*args))


def test_products_in_a_scan_count_as_often_as_it_runs():
    def five(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    assert count(five, X, W) == 5 * PRODUCT
    assert count(jax.jit(five), X, W) == 5 * PRODUCT


def test_a_gradient_is_three_products_and_a_fourth_with_rematerialisation():
    layer = lambda w, x: jnp.sin(x @ w)
    loss = lambda w, x, layer: layer(w, layer(w, x)).sum()
    plain = count(lambda w, x: jax.grad(loss)(w, x, layer), W, X)
    again = count(lambda w, x: jax.grad(loss)(w, x, jax.checkpoint(layer)), W, X)
    assert plain == 5 * PRODUCT  # two forward, two for w, one for the inner x
    assert again == 7 * PRODUCT


def test_convolutions_count_each_of_their_taps():
    x, k = (
        jax.ShapeDtypeStruct((2, 8, 8, 4), "float32"),
        jax.ShapeDtypeStruct((3, 3, 2, 6), "float32"),
    )
    conv = lambda x, k: jax.lax.conv_general_dilated(
        *(x, k, (1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    assert count(conv, x, k) == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 2)


def test_traffic_in_a_loop_counts_as_often_as_it_runs_and_what_is_hidden_is_told_apart():
    assert plan.traffic(TEXT) == {
        "all-gather": plan.Traffic(count=4, bytes=3 * 64 + 32, hidden=3 * 64),
        "all-reduce": plan.Traffic(count=3, bytes=3 * 40, hidden=0),
    }


def test_what_a_product_needs():
    need = plan.needs(jax.jit(lambda x, w: x @ w).trace(X, W), memory=10_000)
    assert need.arguments == 4 * (32 * 64 + 64 * 64)
    assert need.peak >= need.arguments + 4 * 32 * 64
    assert need.flops == PRODUCT
    assert need.traffic == {}
    assert need.fits is False


def test_an_unknown_slice_is_refused_with_the_way_to_get_it():
    with pytest.raises(errors.ConfigError, match="tpu-aot"):
        plan.slice_devices("v99z:1x1")


def test_branches_of_a_conditional_count():
    program = plan._Program(
        """
%left (x: f32[2]) -> f32[2] {
  %a = f32[2] add(%x, %x)
}
%right (x: f32[2]) -> f32[2] {
  %b = f32[2] add(%x, %x)
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %one = f32[2] conditional(%i, %p, %p), branch_computations={%left, %right}
  %two = f32[2] conditional(%q, %p, %p), true_computation=%left, false_computation=%right
}
"""
    )
    assert program.runs() == {"": 1, "left": 2, "right": 2}
