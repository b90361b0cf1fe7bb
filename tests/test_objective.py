"""Budgets: worked numbers, projection rule, and each method drives a toy plant to its budget."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from codesign import objective
from codesign.errors import UnknownNameError


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def test_squared_budget_has_its_minimum_at_the_budget() -> None:
    ratios = jnp.linspace(0.5, 1.5, 101)
    penalties = objective.squared_budget(ratios)
    assert int(jnp.argmin(penalties)) == 50
    np.testing.assert_allclose(jax.grad(objective.squared_budget)(jnp.asarray(1.0)), 0.0)
    np.testing.assert_allclose(objective.squared_budget(jnp.asarray(1.3)), 0.9)  # 10 * .3^2
    check_grads(objective.squared_budget, (ratios,), 2, rtol=1e-4)


def test_one_sided_budget_and_log_price() -> None:
    np.testing.assert_allclose(
        objective.one_sided_budget(jnp.asarray([0.5, 1.0, 3.0])), [0.0, 0.0, 0.4]
    )
    np.testing.assert_allclose(objective.log_price(jnp.asarray(math.e), 0.3), 0.3)
    slope = jax.grad(objective.log_price)(jnp.asarray(4.0), 2.0)
    np.testing.assert_allclose(slope, 0.5)


def test_price_doubles_if_violated_and_halves_if_met() -> None:
    prices = objective.double_price(jnp.asarray([1.0, 1.0]), jnp.asarray([1.2, 0.9]))
    np.testing.assert_array_equal(prices, [2.0, 0.5])


def test_token_cost_ratio_worked_number() -> None:
    # n = 197, d = 384, all tokens enter, .8 leave: .8772
    ratio = objective.token_cost_ratio(jnp.asarray([0.8]), 197, 384)
    assert round(float(ratio), 4) == 0.8772
    np.testing.assert_allclose(objective.token_cost_ratio(jnp.ones(12), 197, 384), 1.0)
    # two layers: the second is entered by what the first kept
    n, d, kept = 10.0, 4.0, 0.5
    first = 2 * n * d**2 + n**2 * d + 4 * kept * n * d**2
    second = 2 * kept * n * d**2 + (kept * n) ** 2 * d + 4 * kept * n * d**2
    expected = (first + second) / 2 / (6 * n * d**2 + n**2 * d)
    got = objective.token_cost_ratio(jnp.full(2, kept), 10, 4)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_projection_worked_number() -> None:
    # g_L . g_C = -.6, so m = .7 g_C = (-.42, .56) and the result (.58, .56)
    gradient, constraint = {"a": jnp.asarray([1.0, 0.0])}, {"a": jnp.asarray([-0.6, 0.8])}
    projected = objective.project_gradient(gradient, constraint, 0.1)
    np.testing.assert_allclose(projected["a"], [0.58, 0.56], atol=1e-10)
    np.testing.assert_allclose(jnp.sum(projected["a"] * constraint["a"]), 0.1, atol=1e-10)
    aligned = objective.project_gradient(gradient, gradient, 0.1)
    np.testing.assert_array_equal(aligned["a"], gradient["a"])  # descends enough already


def random_gradients(getkey, num: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    shapes = {"threshold": (3, 2), "bits": (5,)}
    gradient = {name: jax.random.normal(getkey(), shape) for name, shape in shapes.items()}
    constraints = {
        name: jax.random.normal(getkey(), (num, *shape)) for name, shape in shapes.items()
    }
    return gradient, constraints


def inner(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> float:
    return float(sum(jnp.sum(a[name] * b[name]) for name in a))


def test_projection_of_violated_constraints_only(getkey) -> None:
    gradient, constraints = random_gradients(getkey, 3)
    state = objective.init_projection(3)
    project = jax.jit(objective.project_gradients)
    met, after = project(state, gradient, constraints, jnp.asarray([0.5, 1.0, 0.99]))
    for name in gradient:
        np.testing.assert_array_equal(met[name], gradient[name])
    np.testing.assert_array_equal(after.delta, np.zeros(3))

    # Opposing constraint 1: without projection the step would raise its cost.
    opposed = {name: leaf.at[1].set(-gradient[name]) for name, leaf in constraints.items()}
    got, after = project(state, gradient, opposed, jnp.asarray([0.5, 1.5, 0.9]))
    chosen = {name: leaf[1] for name, leaf in opposed.items()}
    assert inner(gradient, chosen) < 0.0
    np.testing.assert_allclose(inner(got, chosen), after.delta[1], rtol=1e-9)
    np.testing.assert_allclose(after.delta[1], 1e-3 * inner(gradient, gradient))  # equal norms


def test_projection_takes_the_largest_violation_first(getkey) -> None:
    gradient, constraints = random_gradients(getkey, 2)
    constraints = {name: -jnp.abs(leaf) for name, leaf in constraints.items()}
    gradient = {name: jnp.abs(leaf) for name, leaf in gradient.items()}
    ratios = jnp.asarray([1.1, 2.0])
    state = objective.init_projection(2)
    got, after = objective.project_gradients(state, gradient, constraints, ratios)
    first, second = ({name: leaf[i] for name, leaf in constraints.items()} for i in (1, 0))
    by_hand = objective.project_gradient(gradient, first, after.delta[1])
    by_hand = objective.project_gradient(by_hand, second, after.delta[0])
    for name in gradient:
        np.testing.assert_allclose(got[name], by_hand[name], rtol=1e-12)


def test_projection_demand_grows_and_resets(getkey) -> None:
    gradient, constraints = random_gradients(getkey, 1)
    state = objective.init_projection(1)
    deltas = []
    for ratio in (1.2, 1.2, 1.1, 0.9, 1.1):
        _, state = objective.project_gradients(state, gradient, constraints, jnp.asarray([ratio]))
        deltas.append(float(state.delta[0]))
    start = 1e-3 * math.sqrt(
        inner(gradient, gradient)
        * inner({k: v[0] for k, v in constraints.items()},
                {k: v[0] for k, v in constraints.items()})
    )  # fmt: skip
    np.testing.assert_allclose(deltas, [start, 1.1 * start, 1.21 * start, 0.0, start])


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_pid_drives_a_linear_plant_to_its_budget(start: float) -> None:
    def step(state: objective.ConstraintState, _: None) -> tuple[objective.ConstraintState, None]:
        cost = jnp.maximum(2.0 - 0.1 * state.price, 0.05)  # budget met at a price of 10
        return objective.update_pid(state, cost), None

    state = objective.init_constraint("pid", 1)._replace(price=jnp.asarray([start]))
    state = jax.lax.scan(step, state, length=300)[0]
    np.testing.assert_allclose(2.0 - 0.1 * state.price, [1.0], rtol=0.05)


def test_pid_step_by_hand() -> None:
    # e = 1 after a sum of 2 and a previous .5: .5 + .1 * 3 + .2 * .5 = .9 decades
    state = objective.ConstraintState(*(jnp.asarray([v]) for v in (2.0, 2.0, 0.5)))
    got = objective.update_pid(
        state, jnp.asarray([10.0]), proportional=0.5, integral=0.1, derivative=0.2
    )
    np.testing.assert_allclose(jnp.stack(got)[:, 0], [2.0 * 10**0.9, 3.0, 1.0])


# The squared budget rests where its slope balances the loss, above the budget by design.
@pytest.mark.parametrize(
    ("method", "tolerance"), [("lagrangian", 0.01), ("squared", 0.12), ("pid", 0.05)]
)
@pytest.mark.parametrize("budgets", [(0.3, 0.6), (0.25, 0.5)])
def test_each_method_drives_a_trained_plant_to_its_budgets(
    method: str, tolerance: float, budgets: tuple[float, float]
) -> None:
    """Two keep fractions, a loss that grows as they fall, one budget on each."""

    def ratios(v: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(v) / jnp.asarray(budgets)

    def loss(v: jax.Array, state: objective.ConstraintState) -> jax.Array:
        task = jnp.sum(jnp.square(1.0 - jax.nn.sigmoid(v)))
        return task + objective.constraint_penalty(state, ratios(v), method)

    Carry = tuple[jax.Array, objective.ConstraintState]

    def step(carry: Carry, _: None) -> tuple[Carry, None]:
        v, state = carry
        v = v - 0.05 * jnp.clip(jax.grad(loss)(v, state), -1.0, 1.0)
        return (v, objective.update_constraint(state, ratios(v), method)), None

    start = (jnp.full(2, 2.0), objective.init_constraint(method, 2))
    (v, state), _ = jax.jit(lambda s: jax.lax.scan(step, s, length=4000))(start)
    np.testing.assert_allclose(ratios(v), 1.0, rtol=tolerance)
    assert jnp.all(state.price >= 0.0)


def test_lagrangian_penalty_and_price_by_hand() -> None:
    state = objective.init_constraint("lagrangian", 2)._replace(price=jnp.asarray([2.0, 0.2]))
    ratios = jnp.asarray([math.e, 1 / math.e])  # g = 1 and -1; stiffness 30, rate 0.3
    got = objective.constraint_penalty(state, ratios, "lagrangian")
    np.testing.assert_allclose(got, (2.0 - 0.2) + 0.5 * 30.0 * 2)
    updated = objective.update_constraint(state, jnp.asarray([1.2, 0.5]), "lagrangian")
    np.testing.assert_allclose(updated.price, [2.0 + 0.3 * math.log(1.2), 0.2 - 0.3 * 0.3])
    far = objective.update_constraint(state, jnp.asarray([100.0, 1e-3]), "lagrangian")
    np.testing.assert_allclose(
        far.price, [2.0 + 0.3 * 0.3, 0.2 - 0.3 * 0.3]
    )  # violations count as 0.3 at most
    paid = far._replace(price=jnp.zeros(2))
    met = objective.update_constraint(paid, jnp.asarray([0.9, 0.9]), "lagrangian")
    np.testing.assert_array_equal(met.price, [0.0, 0.0])  # never below 0


@pytest.mark.parametrize("method", objective.CONSTRAINT_METHODS)
def test_penalty_gradient(method: str) -> None:
    state = objective.init_constraint(method, 3)._replace(price=jnp.asarray([0.5, 1.0, 2.0]))
    check_grads(
        lambda r: objective.constraint_penalty(state, r, method),
        (jnp.asarray([0.8, 1.1, 1.6]),), 2, rtol=1e-4,
    )  # fmt: skip


def test_unknown_method_lists_the_choices() -> None:
    state, ratios = objective.init_constraint("squared", 1), jnp.ones(1)
    for call in (
        lambda: objective.init_constraint("penalty", 1),
        lambda: objective.constraint_penalty(state, ratios, "penalty"),
        lambda: objective.update_constraint(state, ratios, "penalty"),
    ):
        with pytest.raises(UnknownNameError, match="lagrangian, squared, pid, got 'penalty'"):
            call()
