"""Rules beside fields: what fits is taken as its type, all else is one clear error."""

import inspect
import sys
import types
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i_jax import errors, fields, objective
from t2i_jax.objectives import flow
from t2i_jax.sampling import ode
from tests import runs


class Options(NamedTuple):
    weight: fields.Weight = 0.0
    rate: Annotated[float, fields.above(0)] = 1.0
    decay: Annotated[float, fields.at_least(0), fields.below(1)] = 0.5
    share: fields.Share = 0.5
    pair: Annotated[tuple[float, float], fields.at_least(0)] = (0.0, 1.0)
    times: Annotated[tuple[float, float], fields.between(0, 1), fields.ascending()] = (0.0, 1.0)
    shares: Annotated[float | tuple[float, ...], fields.between(0, 1)] = 0.1
    steps: Annotated[int, fields.count()] = 12
    size: fields.Size = 3
    seed: fields.Seed = 0
    side: Annotated[int | None, fields.at_least(1)] = None
    game: Annotated[str, fields.one_of({"hinge": 1, "minimax": 2})] = "hinge"
    changes: Annotated[tuple[str, ...], fields.one_of(("flip", "cutout"))] = ()
    match: Annotated[str, fields.pattern()] = ""
    teacher: Mapping = {}
    parts: Annotated[tuple[Mapping, ...], fields.Rule(len, " that are not empty")] = ()
    switch: bool = False
    bare: float = 0.0


def built(**options):
    return fields.build(Options, options, where="config.loss")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "weight",
            -1,
            "weight is -1 (at config.loss.weight). Fix: give a finite number, 0 or more",
        ),
        ("weight", True, "give a finite number"),
        ("weight", float("inf"), "weight is inf"),
        ("weight", 10**400, "weight is 1000"),
        ("weight", "1", "weight is '1'"),
        ("weight", None, "weight is None"),
        ("rate", 1e-40, "a finite number above 0"),
        ("decay", 1, "a finite number, 0 or more and below 1"),
        ("share", 1.1, "a finite number from 0 to 1"),
        ("pair", (0.5,), "give 2 finite numbers, 0 or more"),
        ("pair", 0.5, "give 2 finite numbers"),
        ("pair", (0.5, float("nan")), "pair is (0.5, nan)"),
        ("times", (0.9, 0.5), "from 0 to 1 and with the largest last"),
        ("shares", (0.5, 1.5), "a finite number or finite numbers from 0 to 1"),
        ("steps", 0, "a whole number from 1 to 10,000"),
        ("steps", 2.5, "steps is 2.5"),
        ("size", float("nan"), "a whole number, 1 or more"),
        ("seed", 2**32, "from 0 to 4,294,967,295"),
        ("side", 0, "a whole number or None, 1 or more"),
        ("game", "hnge", "unknown game 'hnge' (at config.loss.game). Fix: did you mean 'hinge'?"),
        ("game", 3, "game is 3"),
        ("changes", ("flip", "cutuot"), "did you mean 'cutout'"),
        ("match", "(", "give a text that is a regular expression"),
        ("teacher", 3, "give a dictionary"),
        ("parts", [{}], "give dictionaries that are not empty"),
        ("switch", 1, "give True or False"),
        ("bare", "much", "bare is 'much'"),
        ("gmae", "hinge", "unknown option 'gmae' (at config.loss.gmae). Fix: did you mean 'game'?"),
    ],
)
def test_what_breaks_a_rule_is_one_clear_error(option, value, message):
    with pytest.raises(errors.ConfigError) as caught:
        built(**{option: value})
    assert message in str(caught.value)


def test_what_fits_is_taken_as_its_type():
    config = ml_collections.ConfigDict(dict(weight=2, pair=[1, 2], steps=5.0, teacher=dict(a=1)))
    made = fields.build(Options, config, where="config.loss")
    assert (made.weight, made.pair, made.steps, made.teacher.a) == (2.0, (1.0, 2.0), 5, 1)
    assert [type(x) for x in (made.weight, made.pair[0], made.steps)] == [float, float, int]
    assert built(shares=[0, 1]).shares == (0.0, 1.0)
    assert built(shares=1).shares == 1.0
    assert built(weight=np.float32(0.5), size=np.int64(4))[:1] == (0.5,)
    assert built(bare=-3).bare == -3.0


@given(st.floats(allow_nan=True, allow_infinity=True) | st.integers())
def test_a_number_is_taken_if_and_only_if_float32_holds_it(x):
    with np.errstate(over="ignore"):
        held = np.isfinite(np.float32(x)) if abs(x) < 1e300 else False
    try:
        assert built(bare=x).bare == float(x)
    except errors.ConfigError:
        assert not held or abs(x) > fields.MOST
    else:
        assert held


def test_fields_are_those_of_modules_and_of_functions_too():
    class Net(nn.Module):
        width: fields.Size = 8
        remat: Annotated[str, fields.one_of(("none", "full"))] = "none"

    def make(predict, source, *, count: fields.Size = 3, share=0.5, own=None):
        return predict, source, count, share, own

    assert fields.build(Net, dict(width=4), where="config.model").width == 4
    assert fields.build(make, dict(share=1, own={}), 1, 2, where="here") == (1, 2, 3, 1.0, {})
    for kind, options, given_, message in (
        (Net, dict(width="8"), 0, "width is '8' (at config.model.width)"),
        (Net, dict(remat="fully"), 0, "did you mean 'full'"),
        (Net, dict(name="x"), 0, "unknown option 'name'"),
        (make, dict(predict=1), 1, "unknown option 'predict'"),
        (make, dict(share="half"), 2, "share is 'half'"),
        (make, dict(), 1, "it lacks the option 'source'"),
    ):
        with pytest.raises(errors.ConfigError) as caught:
            fields.build(kind, options, *range(given_), where="config.model")
        assert message in str(caught.value)


def test_what_is_compiled_apart_is_said_beside_the_option():
    def sample(
        nets,
        *,
        steps=3,
        guidance: Annotated[float, fields.at_least(0), fields.compiled_apart(1.0)] = 3.0,
        temperature: Annotated[float, fields.STATIC] = 1.0,
        shift: float = 1.0,
    ):
        pass

    parameters = inspect.signature(sample).parameters
    static = lambda **options: {k for k, v in options.items() if fields.is_static(parameters[k], v)}
    options = dict(steps=2, guidance=1.0, temperature=0.5, shift=1.0)
    assert static(**options) == {"steps", "guidance", "temperature"}
    assert static(**options | {"guidance": 2.0}) == {"steps", "temperature"}


def test_a_shift_without_a_grid_is_refused_wherever_it_stands():
    for shift in (0, -1.0, float("nan"), 1e39):
        with pytest.raises(errors.ConfigError, match="shift is"):
            ode.times(4, shift)
    assert np.isnan(jax.jit(ode.times, static_argnums=0)(4, 0.0)[1])  # nobody can look at it
    img2img = objective.make(runs.config()).predict["img2img"]
    with pytest.raises(errors.ConfigError, match=r"shift is 0 .at config.loss.teacher.shift"):
        fields.check(img2img, dict(shift=0), where="config.loss.teacher", given=3)


def test_defaults_fulfil_their_own_rules():
    for kind, given_ in ((Options, 0), (flow.Options, 0)):
        for name, parameter in fields._parameters(kind, given_).items():
            fields.checked(parameter.annotation, name, parameter.default, where="here")


def test_annotations_written_as_strings_have_their_rules():
    text = """
from __future__ import annotations
from typing import Annotated, NamedTuple
from t2i_jax import fields
class Options(NamedTuple):
    share: Annotated[float, fields.between(0, 1)] = 0.5
def predict(nets, *, share: Annotated[float, fields.between(0, 1)] = 0.5) -> fields.Share: ...
def unknown(nets, *, share: Nothing = 0.5): ...
"""
    module = types.ModuleType("late")
    sys.modules["late"] = module
    try:
        exec(text, module.__dict__)
        for kind, given in ((module.Options, 0), (module.predict, 1)):
            assert fields.check(kind, {"share": 1}, where="here", given=given) == {"share": 1.0}
            with pytest.raises(errors.ConfigError, match="from 0 to 1"):
                fields.check(kind, {"share": 2}, where="here", given=given)
        assert fields.signature(module.predict).return_annotation == fields.Share
        with pytest.raises(errors.ConfigError, match="'Nothing' is not defined"):
            fields.signature(module.unknown)
    finally:
        del sys.modules["late"]
