"""Quantisers: worked numbers, hand-written substituted derivatives, exact integer helpers."""

from collections.abc import Iterator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from codesign import gates, quantize
from codesign.errors import CodesignError


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def exact_quantize(x: np.ndarray, range_: float, bits: int) -> np.ndarray:
    limit = 2 ** (bits - 1) - 1
    scale = range_ / limit
    return scale * np.clip(np.rint(x / scale), -limit, limit)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_code_limit_is_exact(dtype: jnp.dtype) -> None:
    bits = np.arange(1, 17)
    np.testing.assert_array_equal(quantize.code_limit(bits), 2 ** (bits - 1) - 1)
    traced = jax.jit(quantize.code_limit)(jnp.asarray(bits, dtype))
    assert traced.dtype == dtype
    np.testing.assert_array_equal(traced, 2 ** (bits - 1) - 1)
    assert quantize.code_limit(8) == 127


@pytest.mark.parametrize(
    ("bits", "length", "dtype"),
    [
        (4, 40, jnp.int32),
        (8, 1536, jnp.int32),
        (9, 40, jnp.float32),
        (9, 300, jnp.float64),
        (16, 300, jnp.float64),
    ],
)
def test_exact_einsum_is_exact_at_the_ends_of_its_range(
    bits: int, length: int, dtype: jnp.dtype
) -> None:
    rng = np.random.default_rng(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    a, b = (rng.integers(low, high, (2, 3, length)) for _ in range(2))
    a[0], b[0, 0] = low, low
    product = jax.jit(lambda a, b: quantize.exact_einsum("btk,bsk->bts", a, b, bits))(a, b)
    assert product.dtype == dtype
    np.testing.assert_array_equal(np.asarray(product, np.int64), np.einsum("btk,bsk->bts", a, b))


def test_exact_einsum_refuses_sums_that_no_type_holds() -> None:
    operand = jnp.ones((1, 2**10))
    with pytest.raises(AssertionError, match="exact range"):
        quantize.exact_einsum("tk,sk->ts", operand, operand, 23)


def test_deployed_bits_rounds_half_up_within_bounds() -> None:
    bits = jnp.asarray([1.2, 2.5, 3.49, 7.5, 8.9])
    np.testing.assert_array_equal(quantize.deployed_bits(bits, 2, 8), [2, 3, 3, 8, 8])


@pytest.mark.parametrize(
    ("bits", "value", "gradient"),
    [
        ("3.25", "0.35714", "0.095238"),  # Q3 = .33333, Q4 = .42857
        ("3", "0.33333", "0.095238"),  # at an integer, where floor and ceil coincide
        ("8", "0.40157", "0.00475"),  # Q7 = .39683, Q8 = .40157: at the upper rail
    ],
)
def test_interpolated_worked_numbers(bits: str, value: str, gradient: str) -> None:
    def soft(b: jax.Array) -> jax.Array:
        x = jnp.asarray(0.4)
        return quantize.interpolated_quantize(x, 1.0, b, max_bits=8, straight_through=False)

    got_value, got_gradient = jax.value_and_grad(soft)(jnp.asarray(float(bits)))
    assert round(float(got_value), 5) == float(value)
    digits = len(gradient.split(".")[1])
    assert round(float(got_gradient), digits) == float(gradient)


@pytest.mark.parametrize("bits", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_interpolated_equals_quantizer_at_integer_bits(bits: int, dtype: jnp.dtype, getkey) -> None:
    x = jax.random.normal(getkey(), (512,), dtype)
    bits_array = jnp.asarray(bits, dtype)
    exact = quantize.quantize(x, 1.7, bits_array)
    if dtype == jnp.float64:
        np.testing.assert_allclose(exact, exact_quantize(np.asarray(x), 1.7, bits), rtol=1e-15)
    for mode in (False, True):
        got = quantize.interpolated_quantize(x, 1.7, bits_array, max_bits=16, straight_through=mode)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, exact)
    slope = jax.jacfwd(
        lambda b: quantize.interpolated_quantize(x, 1.7, b, max_bits=16, straight_through=False)
    )(bits_array)
    low = min(bits, 15)
    gap = quantize.quantize(x, 1.7, low + 1) - quantize.quantize(x, 1.7, low)
    np.testing.assert_array_equal(slope, gap)
    assert jnp.any(slope != 0.0)


@pytest.mark.parametrize("bits", [2.2, 4.5, 7.5, 7.9])
def test_interpolated_derivatives_by_hand(bits: float, getkey) -> None:
    x = 1.5 * jax.random.normal(getkey(), (256,))
    cotangent = jax.random.normal(getkey(), x.shape)
    range_ = 1.3

    def total(x: jax.Array, r: jax.Array, b: jax.Array, mode: bool) -> jax.Array:
        got = quantize.interpolated_quantize(x, r, b, max_bits=8, straight_through=mode)
        return jnp.sum(cotangent * got)

    low, fraction = int(bits), bits - int(bits)
    values = np.asarray(x)
    inside = np.abs(values) <= range_
    d_range = np.zeros_like(values)
    for width, share in ((low, 1 - fraction), (low + 1, fraction)):
        limit = 2 ** (width - 1) - 1
        ratio = values / (range_ / limit)
        d_range += share * np.where(inside, (np.rint(ratio) - ratio) / limit, np.sign(values))
    gap = exact_quantize(values, range_, low + 1) - exact_quantize(values, range_, low)
    for mode in (False, True):
        d_x, d_r, d_b = jax.grad(total, argnums=(0, 1, 2))(
            x, jnp.asarray(range_), jnp.asarray(bits), mode
        )
        np.testing.assert_allclose(d_x, cotangent * inside, rtol=1e-12)
        np.testing.assert_allclose(d_r, np.sum(cotangent * d_range), rtol=1e-10)
        np.testing.assert_allclose(d_b, np.sum(cotangent * gap), rtol=1e-10)
    forward = quantize.interpolated_quantize(x, range_, bits, max_bits=8, straight_through=True)
    np.testing.assert_array_equal(forward, quantize.quantize(x, range_, np.floor(bits + 0.5)))


def test_interpolated_gradient_against_finite_differences(getkey, monkeypatch) -> None:
    """With rounding errors frozen the substituted derivative is a true one."""
    frozen: dict[int, jax.Array] = {}
    calls = 0

    def freeze(hard: jax.Array, soft: jax.Array) -> jax.Array:
        nonlocal calls
        calls += 1
        error = frozen.setdefault(calls, jax.lax.stop_gradient(hard - soft))
        return soft + error

    def freeze_constant(x: jax.Array) -> jax.Array:
        nonlocal calls
        calls += 1
        return frozen.setdefault(calls, jax.lax.stop_gradient(x))

    x, ranges, bits = (
        jax.random.uniform(getkey(), (2, 16), minval=-2.0, maxval=2.0),
        jnp.asarray([[1.1], [1.6]]),
        jnp.asarray([[4.5], [3.3]]),
    )

    def value(x: jax.Array, r: jax.Array, b: jax.Array, mode: bool = False) -> jax.Array:
        nonlocal calls
        calls = 0
        return quantize.interpolated_quantize(x, r, b, max_bits=8, straight_through=mode)

    with monkeypatch.context() as patch:
        patch.setattr(gates, "straight_through", freeze)
        patch.setattr(gates, "detach", freeze_constant)
        value(x, ranges, bits)
        check_grads(value, (x, ranges, bits), 1, rtol=1e-5)
        expected = jax.jacobian(value, argnums=(0, 1, 2))(x, ranges, bits)
    for mode in (False, True):
        got = jax.jacobian(value, argnums=(0, 1, 2))(x, ranges, bits, mode)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 6), (4, 1)])
@pytest.mark.parametrize("bits", [0.4, 1.7, 2.0, 4.5, 7.9, 8.0])
def test_straight_through_derivatives_are_those_of_the_interpolation(
    shape: tuple[int, ...], bits: float, getkey
) -> None:
    """However ranges and widths are broadcast, from no code at all to the upper rail."""
    x, slope = (jax.random.normal(getkey(), (4, 6)) for _ in range(2))
    ranges = jnp.broadcast_to(jnp.asarray(1.1), shape)
    x = x.at[0, 0].set(1.1)  # exactly at the end of the range

    def total(x: jax.Array, r: jax.Array, b: jax.Array, mode: bool) -> jax.Array:
        r, b = (jnp.reshape(v, (1,) * (2 - v.ndim) + v.shape) for v in (r, b))
        return jnp.sum(
            slope * quantize.interpolated_quantize(x, r, b, max_bits=8, straight_through=mode)
        )

    for widths in (jnp.asarray(bits), jnp.broadcast_to(jnp.asarray(bits), shape)):
        soft, hard = (
            jax.grad(total, argnums=(0, 1, 2))(x, ranges, widths, mode) for mode in (False, True)
        )
        for got, wanted in zip(hard, soft, strict=True):
            assert got.shape == wanted.shape
            np.testing.assert_allclose(got, wanted, atol=1e-12)


def test_interpolated_with_bits_and_ranges_per_row_and_one_trace(getkey) -> None:
    traces = 0

    @jax.jit
    def both(x: jax.Array, r: jax.Array, b: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return quantize.interpolated_quantize(x, r, b, max_bits=8, straight_through=True)

    x = jax.random.normal(getkey(), (3, 40))
    ranges, bits = jnp.asarray([[1.0], [2.0], [0.5]]), jnp.asarray([[2.0], [4.6], [8.0]])
    got = both(x, ranges, bits)
    for row, width in enumerate((2, 5, 8)):
        expected = exact_quantize(np.asarray(x[row]), float(ranges[row, 0]), width)
        np.testing.assert_allclose(got[row], expected, rtol=1e-14)
    both(x, ranges, bits + 0.25)
    assert traces == 1


def test_no_bits_quantise_to_zero(getkey) -> None:
    x = jax.random.normal(getkey(), (32,))
    for bits in (0, 1):
        np.testing.assert_array_equal(quantize.quantize(x, 1.0, bits), np.zeros(32))
    assert quantize.ebops(jnp.asarray(100.0), jnp.asarray(0.0), jnp.asarray(8.0)) == 0.0


def test_largest_element_keeps_its_whole_gradient() -> None:
    # clip() would give the element that set the range one half
    slope = jax.grad(lambda x: quantize.quantize(x, 1.0, 8))(jnp.asarray(1.0))
    assert slope == 1.0


def test_probabilities_use_codes_up_to_the_limit(getkey) -> None:
    p = jax.nn.softmax(3 * jax.random.normal(getkey(), (4, 16)), axis=-1)
    got = quantize.quantize_probabilities(p, 8.0, max_bits=16, straight_through=True)
    codes = np.asarray(got) * 127
    np.testing.assert_allclose(codes, np.rint(np.asarray(p) * 127), atol=1e-9)
    assert codes.min() >= 0
    full = quantize.quantize_probabilities(jnp.ones(1), 8.0, max_bits=16, straight_through=True)
    np.testing.assert_array_equal(full, [1.0])


def test_error_scaling_worked_number(getkey) -> None:
    # x = .7, f = 2: round(2.8)/4 = .75; ln2 (.7 - .75) = -.034657
    value, (d_x, d_f) = jax.value_and_grad(quantize.error_scaling_quantize, argnums=(0, 1))(
        jnp.asarray(0.7), jnp.asarray(2.0)
    )
    assert (float(value), float(d_x), round(float(d_f), 6)) == (0.75, 1.0, -0.034657)
    x, bits = jax.random.normal(getkey(), (4, 8)), jnp.asarray([[1.0], [2.3], [5.5], [0.0]])
    got = quantize.error_scaling_quantize(x, bits)
    np.testing.assert_array_equal(got, np.rint(x * 2.0 ** np.array([[1], [2], [6], [0]]))
                                  / 2.0 ** np.array([[1], [2], [6], [0]]))  # fmt: skip
    slope = jax.grad(lambda b: jnp.sum(quantize.error_scaling_quantize(x, b)))(bits)
    np.testing.assert_allclose(slope, np.log(2) * np.sum(x - got, axis=1, keepdims=True))


def test_step_and_range_imply_bits() -> None:
    step, range_ = jnp.asarray(0.125), jnp.asarray(1.0)
    assert quantize.inferred_bits(step, range_) == 5
    assert quantize.inferred_bits(step, range_, is_signed=False) == 4
    # d log2(r/s + 1) / dr = 1 / (ln2 s (r/s + 1))
    slope = jax.grad(lambda r: quantize.inferred_bits(step, r))(range_)
    np.testing.assert_allclose(slope, 1 / (np.log(2) * 0.125 * 9))


def test_step_and_range_derivatives_by_hand(getkey) -> None:
    x = jax.random.normal(getkey(), (64,))
    step, range_ = jnp.asarray(0.3), jnp.asarray(0.9)
    value = quantize.step_range_quantize(x, step, range_)
    d_step, d_range = jax.jacfwd(quantize.step_range_quantize, argnums=(1, 2))(x, step, range_)
    inside = np.abs(x) <= 0.9
    np.testing.assert_allclose(d_step, np.where(inside, (value - x) / 0.3, 0.0), atol=1e-12)
    np.testing.assert_allclose(d_range, np.where(inside, 0.0, np.sign(x)))


def test_lsq_worked_number() -> None:
    # x = .7, s = .25: round(2.8) - 2.8 = .2, times 1/sqrt(1 * 7) at 4 bits
    slope = jax.grad(lambda s: quantize.lsq_quantize(jnp.asarray([0.7]), s, 4)[0])
    assert round(float(slope(jnp.asarray(0.25))) * np.sqrt(7), 12) == 0.2


def test_lsq_outside_the_range() -> None:
    x, step = jnp.asarray([-9.0, 9.0, 0.4]), jnp.asarray(0.25)
    value = quantize.lsq_quantize(x, step, 4)
    np.testing.assert_array_equal(value, [-2.0, 1.75, 0.5])
    d_x = jax.vjp(lambda v: quantize.lsq_quantize(v, step, 4), x)[1](jnp.ones(3))[0]
    np.testing.assert_array_equal(d_x, [0.0, 0.0, 1.0])
    d_step = jax.jacfwd(lambda s: quantize.lsq_quantize(x, s, 4))(step)
    np.testing.assert_allclose(d_step * np.sqrt(3 * 7), [-8.0, 7.0, 0.4], rtol=1e-12)
    # 2 * mean(9, 9, .4) / sqrt(7)
    np.testing.assert_allclose(quantize.lsq_initial_step(x, 4), 2 * 18.4 / 3 / np.sqrt(7))


def test_nested_residuals_worked_numbers() -> None:
    # range [-1, 1], x = .4: s2 = 2/3 -> .66667; s4 = .13333 -> .4; s8 = .007843
    x, low, high = jnp.asarray(0.4), jnp.asarray(-1.0), jnp.asarray(1.0)
    opened, closed = jnp.asarray(1.0), jnp.asarray(0.0)

    def value(*switches: jax.Array) -> float:
        return float(quantize.nested_residual_quantize(x, low, high, switches))

    assert round(value(opened), 5) == 0.66667
    assert round(value(opened, opened), 12) == 0.4
    assert value(opened, closed, opened) == value(opened)  # a closed gate closes the finer ones
    assert value(closed, opened, opened) == 0.0
    step8 = (2 / 3) / 5 / 17
    assert round(step8, 6) == 0.007843
    fine = quantize.nested_residual_quantize(jnp.asarray(0.41), low, high, (opened,) * 3)
    np.testing.assert_allclose(fine, round(0.41 / step8) * step8)  # planes nest
    slope = jax.grad(lambda v: quantize.nested_residual_quantize(v, low, high, (opened,) * 3))
    assert (float(slope(x)), float(slope(jnp.asarray(1.5)))) == (1.0, 0.0)


@pytest.mark.parametrize(("bits_a", "bits_b"), [(4.0, 8.0), (3.25, 6.5), (8.0, 2.1)])
def test_bilinear_ebops(bits_a: float, bits_b: float) -> None:
    macs = jnp.asarray([100.0, 50.0])
    mean = 0.0
    for a in (np.floor(bits_a), np.floor(bits_a) + 1):
        for b in (np.floor(bits_b), np.floor(bits_b) + 1):
            mean += (1 - abs(bits_a - a)) * (1 - abs(bits_b - b)) * 150 * a * b
    got = quantize.ebops(macs, jnp.asarray(bits_a), jnp.asarray(bits_b))
    np.testing.assert_allclose(got, mean, rtol=1e-12)
    check_grads(quantize.ebops, (macs, jnp.asarray(bits_a), jnp.asarray(bits_b)), 1, rtol=1e-5)
    slope = jax.grad(quantize.ebops, argnums=1)(macs, jnp.asarray(bits_a), jnp.asarray(bits_b))
    assert slope > 0.0


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_codes_match_the_fake_quantiser(bits: int, getkey) -> None:
    x = jax.random.normal(getkey(), (512,))
    range_ = 1.9
    scale = range_ / quantize.code_limit(bits)
    codes = quantize.quantize_codes(np.asarray(x), scale, bits)
    assert codes.dtype == np.int64
    assert np.abs(codes).max() == quantize.code_limit(bits)
    np.testing.assert_allclose(codes * scale, quantize.quantize(x, range_, bits), rtol=1e-14)
    np.testing.assert_array_equal(
        quantize.quantize_codes([0.5, 1.5, -2.5, 99.0], 1.0, 8), [0, 2, -2, 99]
    )


def test_multiplier_by_hand() -> None:
    # 1 = 2^14 2^-14; 3 = 24576 2^-13; .75 likewise 2^-15; 1 - 2^-17 rounds up to 1
    mantissa, shift = quantize.multiplier([1.0, 3.0, 0.75, 1 - 2.0**-17, 0.0])
    np.testing.assert_array_equal(mantissa, [16384, 24576, 24576, 16384, 0])
    np.testing.assert_array_equal(shift, [14, 13, 15, 14, 0])


def test_multiplier_is_the_nearest_one() -> None:
    factors = 10.0 ** np.random.default_rng(0).uniform(-14, 4.4, (40, 50))
    mantissa, shift = quantize.multiplier(factors)
    assert mantissa.shape == factors.shape
    assert np.all((mantissa >= 2**14) & (mantissa < 2**15) & (shift >= 0) & (shift <= 62))
    for factor, m, s in zip(factors.flat, mantissa.flat, shift.flat, strict=True):
        error = abs(Fraction(int(m), 2 ** int(s)) - Fraction(float(factor)))
        assert error <= Fraction(1, 2 ** (int(s) + 1))


@pytest.mark.parametrize("factor", [2.0**15, 2.0**-50, -1.0, np.inf, np.nan])
def test_multiplier_outside_its_range(factor: float) -> None:
    with pytest.raises(CodesignError, match="multiplier, got .*calibrated scales"):
        quantize.multiplier([1.0, factor])
