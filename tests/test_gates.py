"""Gates: worked numbers of the papers, limits, straight-through contract, safe edges."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from codesign import gates


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def relaxation(temperature: float, straight_through: bool) -> gates.Relaxation:
    return gates.Relaxation(
        temperature=jnp.asarray(temperature),
        smoothness=jnp.asarray(8.0),
        straight_through=straight_through,
    )


def test_sigmoid_gate_worked_number() -> None:
    # (0.6 - 0.5) / 0.1 = 1: sigmoid(1) = .7311, slope .7311 * .2689 / .1 = 1.9661
    def value(x: jax.Array, theta: jax.Array) -> jax.Array:
        return gates.soft_gate(x, theta, temperature=jnp.asarray(0.1))

    x, theta = jnp.asarray(0.6), jnp.asarray(0.5)
    assert round(float(value(x, theta)), 4) == 0.7311
    d_x, d_theta = jax.grad(value, argnums=(0, 1))(x, theta)
    assert round(float(d_x), 4) == 1.9661
    np.testing.assert_allclose(d_theta, -d_x)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_soft_gate_gradient_and_monotonicity(temperature: float) -> None:
    scores = jnp.linspace(-1.0, 1.0, 41)

    def value(x: jax.Array, theta: jax.Array, tau: jax.Array) -> jax.Array:
        return gates.soft_gate(x, theta, temperature=tau)

    gate = value(scores, jnp.asarray(0.2), jnp.asarray(temperature))
    assert jnp.all((gate > 0.0) & (gate < 1.0))
    assert jnp.all(jnp.diff(gate) > 0.0)
    check_grads(value, (scores, jnp.asarray(0.2), jnp.asarray(temperature)), 2, rtol=1e-3)


def test_soft_gate_tends_to_hard_gate(getkey) -> None:
    scores = jax.random.normal(getkey(), (4, 64))
    threshold = jnp.full((4, 1), 0.3)
    hard = gates.hard_gate(scores, threshold, temperature=jnp.asarray(1.0))
    errors = [
        float(jnp.max(jnp.abs(gates.soft_gate(scores, threshold, temperature=tau) - hard)))
        for tau in jnp.asarray([1e-2, 1e-4, 1e-6])
    ]
    assert errors[0] > errors[1] > errors[2] or errors[1] == 0.0
    assert errors[2] < 1e-6
    at_threshold = gates.soft_gate(threshold, threshold, temperature=jnp.asarray(1e-9))
    assert jnp.all(at_threshold == 0.5)  # the one point where the limit is not the hard gate
    assert jnp.all(gates.hard_gate(threshold, threshold, temperature=jnp.asarray(1.0)) == 0.0)


def test_straight_through_gate_is_binary_with_soft_gradient(getkey) -> None:
    scores = jax.random.normal(getkey(), (3, 32))
    spread = jnp.std(scores, axis=-1, keepdims=True)
    threshold = jnp.full((3, 1), -0.1)
    weight = jax.random.normal(getkey(), scores.shape)

    def total(theta: jax.Array, straight_through: bool) -> jax.Array:
        gate = gates.gate(scores, theta, relaxation(0.3, straight_through), spread=spread)
        return jnp.sum(weight * gate)

    gate = gates.gate(scores, threshold, relaxation(0.3, True), spread=spread)
    np.testing.assert_array_equal(gate, np.asarray(scores) > -0.1)
    gradients = [jax.grad(total)(threshold, mode) for mode in (True, False)]
    np.testing.assert_array_equal(gradients[0], gradients[1])
    assert jnp.all(gradients[0] != 0.0)


def test_gate_temperature_is_in_units_of_the_spread_which_is_constant(getkey) -> None:
    scores = jax.random.normal(getkey(), (3, 32))

    def value(scale: jax.Array) -> jax.Array:
        scaled = scale * scores
        spread = jnp.std(scaled, axis=-1, keepdims=True)
        return gates.gate(scaled, 0.2 * scale * jnp.ones((3, 1)), relaxation(0.3, False),
                          spread=spread)  # fmt: skip

    np.testing.assert_allclose(value(jnp.asarray(1.0)), value(jnp.asarray(50.0)), rtol=1e-12)
    # A trained spread would make the gate constant in the scale; a detached one doesn't.
    assert jnp.any(jnp.abs(jax.jacobian(value)(jnp.asarray(1.0))) > 1e-3)


def test_gate_of_equal_scores_is_finite() -> None:
    def total(scores: jax.Array) -> jax.Array:
        zeros = jnp.zeros((2, 1))
        return jnp.sum(gates.gate(scores, zeros, relaxation(0.1, True), spread=zeros))

    assert jnp.all(jnp.isfinite(jax.grad(total)(jnp.zeros((2, 4)))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_straight_through_forward_is_exact(dtype: jnp.dtype, getkey) -> None:
    # soft + (hard - soft) would lose bits here
    hard = jax.random.normal(getkey(), (256,), dtype)
    soft = 1e6 * jax.random.normal(getkey(), (256,), dtype)
    np.testing.assert_array_equal(gates.straight_through(hard, soft), hard)
    assert gates.straight_through(soft > 0, soft).dtype == dtype


def test_straight_through_under_transformations() -> None:
    x = jnp.linspace(-1.3, 1.3, 7)

    def f(v: jax.Array) -> jax.Array:
        return gates.straight_through(jnp.round(v), jnp.sin(v))

    expected = jnp.cos(x)
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(x), expected)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(jax.checkpoint(f))))(x), expected)
    value, tangent = jax.jvp(f, (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(value, jnp.round(x))
    np.testing.assert_allclose(tangent, expected)

    def scanned(v: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda c, e: (c + f(e), f(e)), jnp.zeros(()), v)[1])

    np.testing.assert_allclose(jax.grad(scanned)(x), expected)


def test_tanh_soft_threshold_worked_numbers() -> None:
    # x = .6: .6 tanh(1) = .45696; x = .4: 1000 tanh(-1) = -761.594
    logits = gates.tanh_soft_threshold(jnp.asarray([0.6, 0.4]), jnp.asarray(0.5))
    assert [round(float(logits[0]), 5), round(float(logits[1]), 3)] == [0.45696, -761.594]
    check_grads(
        lambda x, t: gates.tanh_soft_threshold(x, t),
        (jnp.asarray([0.6, 0.4]), jnp.asarray(0.5)), 1, rtol=1e-4,
    )  # fmt: skip


def test_tanh_density_counts_kept_logits() -> None:
    logits = jnp.asarray([3.0, -1.0, 2.0, -2.0])
    pruned = gates.tanh_soft_threshold(logits, jnp.asarray(0.0))
    np.testing.assert_allclose(gates.tanh_density(pruned), 0.5, atol=1e-12)


def test_hard_concrete_probability_worked_numbers() -> None:
    # shift (2/3) log(.1/1.1) = -1.5986: phi = 6 -> .9995, 0 -> .8318
    probability = gates.hard_concrete_probability(jnp.asarray([6.0, 0.0]))
    assert [round(float(value), 4) for value in probability] == [0.9995, 0.8318]


def test_hard_concrete_samples_open_as_often_as_stated(getkey) -> None:
    location = jnp.full(20_000, -0.5)
    sample = gates.hard_concrete_gate(location, key=getkey())
    assert jnp.all((sample >= 0.0) & (sample <= 1.0))
    stated = float(gates.hard_concrete_probability(location)[0])
    # four standard errors of a fraction of 20,000
    assert abs(float(jnp.mean(sample > 0.0)) - stated) < 4 * np.sqrt(stated * (1 - stated) / 2e4)


@pytest.mark.parametrize("tau", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("theta", [-3.0, -1.0, 0.0, 1.0])
def test_threshold_gradient_of_kept_fraction(theta: float, tau: float, getkey) -> None:
    printed = {
        0.5: {-3.0: 0.0243, -1.0: 0.2248, 0.0: 0.3029, 1.0: 0.2248},
        0.1: {-3.0: 0.0050, -1.0: 0.2419, 0.0: 0.3926, 1.0: 0.2419},
        0.02: {-3.0: 0.0045, -1.0: 0.2420, 0.0: 0.3987, 1.0: 0.2420},
    }[tau][theta]
    grid, step = np.linspace(-9.0, 9.0, 18_001, retstep=True)
    density = jnp.asarray(np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi) * step)

    def kept(t: jax.Array, x: jax.Array, mass: jax.Array) -> jax.Array:
        return jnp.sum(mass * gates.soft_gate(x, t, temperature=jnp.asarray(tau)))

    slope = jax.grad(kept)
    quadrature = slope(jnp.asarray(theta), jnp.asarray(grid), density)
    np.testing.assert_allclose(-quadrature, printed, atol=1e-4)
    samples = jax.random.normal(getkey(), (200_000,))
    sampled = slope(jnp.asarray(theta), samples, jnp.full(samples.shape, 1 / samples.size))
    np.testing.assert_allclose(-sampled, printed, atol=0.005)


def test_masked_softmax_equals_softmax_over_kept_keys(getkey) -> None:
    logits = jax.random.normal(getkey(), (3, 8))
    weights = (jax.random.uniform(getkey(), (3, 8)) > 0.4).astype(logits.dtype).at[:, 0].set(1.0)
    got = gates.masked_softmax(logits, weights, epsilon=0.0)
    expected = jax.nn.softmax(jnp.where(weights > 0, logits, -jnp.inf), axis=-1)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_masked_softmax_weights_add_to_logits_as_logarithms(getkey) -> None:
    logits, weights = (jax.random.uniform(getkey(), (2, 8), minval=0.1) for _ in range(2))
    got = gates.masked_softmax(logits, weights, epsilon=0.0)
    np.testing.assert_allclose(got, jax.nn.softmax(logits + jnp.log(weights)), rtol=1e-12)
    # epsilon worked by hand: two keys, logits 0, w = (1, 0), eps = .5: (1 + .25, .25) / 1.5
    pair = gates.masked_softmax(jnp.zeros((1, 2)), jnp.asarray([[1.0, 0.0]]), epsilon=0.5)
    np.testing.assert_allclose(pair, [[1.25 / 1.5, 0.25 / 1.5]])


def test_masked_softmax_gradients() -> None:
    logits = jnp.asarray([[0.3, 1.0, -0.4, 0.9]])
    weights = jnp.asarray([[0.9, 0.0, 0.7, 0.2]])
    for epsilon in (0.0, 1e-5):
        check_grads(
            lambda w, e=epsilon: gates.masked_softmax(logits, w, epsilon=e), (weights,), 1,
            modes=["rev"], rtol=1e-4,
        )  # fmt: skip
    # m is constant and drops out only without epsilon
    check_grads(
        lambda x: gates.masked_softmax(x, weights, epsilon=0.0), (logits,), 1,
        modes=["rev"], rtol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_masked_softmax_derivatives_are_the_automatic_ones(epsilon: float, getkey) -> None:
    logits, slope = (3.0 * jax.random.normal(getkey(), (4, 9)) for _ in range(2))
    weights = jax.random.uniform(getkey(), (4, 9)).at[1].set(0.0).at[2, :8].set(0.0)
    weights = weights.at[2, 8].set(1.0)
    logits = logits.at[2, 0].set(100.0)  # dropped, and beyond the largest exponent
    mask = jnp.asarray(np.arange(9) < 7).at[8].set(True)[None, :] | (jnp.zeros((4, 1)) > 0.0)

    def by_definition(x: jax.Array, w: jax.Array) -> jax.Array:
        kept = jnp.where(mask, w, 0.0)
        alive = jnp.where(kept >= 0.5, x, -jnp.inf).max(-1, keepdims=True)
        top = jnp.where(
            jnp.isfinite(alive), alive, jnp.where(mask, x, -jnp.inf).max(-1, keepdims=True)
        )
        masses = kept * jnp.exp(jnp.minimum(x - jax.lax.stop_gradient(top), gates.MAX_EXPONENT))
        total = jnp.sum(masses, axis=-1, keepdims=True) + epsilon
        return (masses + jnp.where(mask, epsilon / 8.0, 0.0)) / jnp.where(total > 0.0, total, 1.0)

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return gates.masked_softmax(x, w, epsilon=epsilon, mask=mask)

    np.testing.assert_allclose(ours(logits, weights), by_definition(logits, weights), rtol=1e-12)
    got, wanted = (
        jax.grad(lambda x, w, f=f: jnp.sum(slope * f(x, w)), argnums=(0, 1))(logits, weights)
        for f in (ours, by_definition)
    )
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-9, atol=1e-12)
    # Towards a gate of 0, no more than exp(2) of the row's largest kept mass.
    alive = jnp.where(mask & (weights >= 0.5), logits, -jnp.inf).max(-1, keepdims=True)
    top = jnp.where(jnp.isfinite(alive), alive, jnp.where(mask, logits, -jnp.inf).max(-1)[:, None])
    above = jnp.minimum(logits - top, gates.MAX_EXPONENT)
    excess = jnp.maximum(above - gates.MAX_DROPPED_EXPONENT, 0.0) * (weights == 0.0)
    assert float(jnp.max(excess)) > 50.0
    np.testing.assert_allclose(got[1], wanted[1] * jnp.exp(-excess), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_masked_softmax_ignores_padding_and_survives_empty_rows(epsilon: float, getkey) -> None:
    logits = jax.random.normal(getkey(), (2, 5))
    weights = jax.random.uniform(getkey(), (2, 5))
    short = gates.masked_softmax(logits, weights, epsilon=epsilon)
    padded = gates.masked_softmax(
        jnp.pad(logits, ((0, 0), (0, 3)), constant_values=1e4),
        jnp.pad(weights, ((0, 0), (0, 3)), constant_values=1.0),
        epsilon=epsilon,
        mask=jnp.arange(8)[None, :] < jnp.full((2, 1), 5),
    )
    np.testing.assert_allclose(padded[:, :5], short, rtol=1e-12)
    assert jnp.all(padded[:, 5:] == 0.0)

    def total(x: jax.Array, w: jax.Array) -> jax.Array:
        empty = gates.masked_softmax(x, w, epsilon=epsilon, mask=jnp.zeros((2, 5), bool))
        closed = gates.masked_softmax(x, w, epsilon=epsilon)
        return jnp.sum(jnp.square(empty)) + jnp.sum(jnp.square(closed))

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(logits, jnp.zeros((2, 5)))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in (value, *gradients))
    masked = gates.masked_softmax(logits, weights, epsilon=epsilon, mask=jnp.zeros((2, 5), bool))
    assert jnp.all(masked == 0.0)


def test_masked_softmax_with_dropped_key_far_above_the_kept_ones() -> None:
    logits = jnp.asarray([[500.0, 1.0, 0.0]], jnp.float32)
    weights = jnp.asarray([[0.0, 1.0, 1.0]], jnp.float32)

    def first(w: jax.Array) -> jax.Array:
        return gates.masked_softmax(logits, w, epsilon=1e-5)[0, 1]

    np.testing.assert_allclose(first(weights), jax.nn.sigmoid(1.0), rtol=1e-5)
    assert jnp.all(jnp.isfinite(jax.grad(first)(weights)))


@pytest.mark.parametrize(
    ("num", "p", "bound"),
    [(2, 8, 1.0905), (4, 8, 1.1892), (5, 8, 1.2228),
     (2, 32, 1.0219), (4, 32, 1.0443), (5, 32, 1.0516)],
)  # fmt: skip
def test_smooth_max_bounds(num: int, p: int, bound: float, getkey) -> None:
    equal = gates.smooth_max(jnp.full(num, 7.0), p)
    assert round(float(equal) / 7.0, 4) == bound  # the bound is reached by equal values
    values = jax.random.uniform(getkey(), (64, num))
    ratio = gates.smooth_max(values, p, axis=-1) / jnp.max(values, axis=-1)
    rounding = 1e-12
    assert jnp.all((ratio >= 1.0 - rounding) & (ratio <= num ** (1 / p) + rounding))


def test_smooth_max_worked_numbers() -> None:
    values = jnp.asarray([10.0, 8.0, 3.0])
    assert round(float(gates.smooth_max(values, 8.0)), 4) == 10.1958
    assert round(float(gates.smooth_max(values, 32.0)), 4) == 10.0002
    # cycles per resource of the golden matmul, spec'd ratio 1.0230 at p = 8 and 1.0000 at 32
    golden = jnp.asarray([294_912.0, 8_021.6, 328_704.0, 337_920.0, 454_656.0])
    assert round(float(gates.smooth_max(golden, 8.0) / 454_656.0), 4) == 1.0230
    assert round(float(gates.smooth_max(golden, 32.0) / 454_656.0), 4) == 1.0000


@pytest.mark.parametrize("p", [8.0, 32.0])
def test_smooth_max_gradient_shares(p: float) -> None:
    values = jnp.asarray([10.0, 8.0, 3.0, 0.0])
    value, shares = jax.value_and_grad(gates.smooth_max)(values, p)
    np.testing.assert_allclose(shares, (values / value) ** (p - 1), rtol=1e-12)
    np.testing.assert_allclose(jnp.sum(shares * values), value, rtol=1e-12)
    check_grads(jax.jit(gates.smooth_max), (values[:3], jnp.asarray(p)), 1, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_smooth_max_is_scale_free_and_safe_at_zero(dtype: jnp.dtype) -> None:
    values = jnp.asarray([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype)
    p = jnp.asarray(32.0, dtype)
    small = gates.smooth_max(values, p)
    np.testing.assert_allclose(gates.smooth_max(1e30 * values, p), 1e30 * small, rtol=1e-5)
    assert small[1] == 0.0
    for axis in (0, 1):
        total = jax.jit(jax.grad(lambda x, a=axis: jnp.sum(gates.smooth_max(x, p, axis=a))))
        assert jnp.all(jnp.isfinite(total(values)))


def test_annealing_does_not_recompile() -> None:
    traces = 0

    @jax.jit
    def step(relaxed: gates.Relaxation) -> jax.Array:
        nonlocal traces
        traces += 1
        gate = gates.gate(jnp.ones((1, 4)), jnp.zeros((1, 1)), relaxed, spread=jnp.ones((1, 1)))
        return jnp.sum(gate) + gates.smooth_max(jnp.arange(4.0), relaxed.smoothness)

    for temperature in (0.5, 0.2, 0.05):
        step(relaxation(temperature, True))
    assert traces == 1
