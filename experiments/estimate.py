"""Expected wall time of training runs and curves, for people who plan."""

from codesign.experiments.data import TextInput
from codesign.experiments.problem import Problem
from codesign.experiments.train import ACTIVATION_SHARES, BUDGET_BISECTIONS, THRESHOLD_MOVES

# Seconds per multiplication of a linear layer, and per pair of a query and a key in all heads: of a dense step, a step with
# a budget, and the integer path. Those of the steps are solved from MiniLM's at 8 x 128 and 2 x 512 tokens (Energon, two
# cores); those of the integer path are a guess from its speed on digits, not fitted.
DENSE_STEP = (33e-12, 6.4e-9)
STEP = (42e-12, 19e-9)
INTEGER_PATH = (60e-12, 15e-9)
# Seconds of what does not grow (guesses): a step, a run of the integer path, and loading, compiling and finding the start.
SECONDS_STEP = 0.01
SECONDS_RUN = 0.15
SECONDS_SETUP = 45.0
NUM_FITTING_RUNS = (len(ACTIVATION_SHARES) + len(THRESHOLD_MOVES)) * (BUDGET_BISECTIONS + 2)
"""Runs over the calibration examples that find where a budget is met, before a point is trained."""
NUM_ROUNDING_RUNS = 50
"""Forward passes of the step's model over the calibration examples that round the widths (about; counted on MiniLM)."""
FORWARD_SHARE = 1.0 / 3.0
"""Time of a forward pass over that of a step: the backward pass takes two (rule of thumb)."""


def example_seconds(problem: Problem, rates: tuple[float, float]) -> float:
    """Returns the expected time of one example, s; text is taken at its full length."""
    structure, entry = problem.config.structure, problem.task.input
    tokens = entry.max_tokens if isinstance(entry, TextInput) else structure.max_tokens
    weights = structure.width * (4 * structure.attention_width + 2 * structure.hidden)
    per_multiplication, per_pair = rates
    layer = tokens * weights * per_multiplication + structure.num_heads * tokens**2 * per_pair
    return structure.num_layers * layer


def estimate_seconds(
    problem: Problem,
    *,
    num_points: int = 1,
    num_fitted: int = 1,
    num_runs: int = 2,
    num_measured: int = 0,
    num_seeds: int = 1,
    dense_is_cached: bool = False,
) -> float:
    """Returns the expected time on two cores, s, the dense models included unless they are there.

    Args:
      problem: Sizes of the model, steps and examples per step; its outline is enough.
      num_points: Points trained with one seed.
      num_fitted: How many of them start by meeting a budget.
      num_runs: Settings measured with one seed.
      num_measured: Examples measured with one seed, all settings together; 0: the validation part in each run.
      num_seeds: Seeds.
      dense_is_cached: Whether the dense model of every seed has been trained before.
    """
    experiment = problem.experiment
    dense, budgeted = experiment.dense, experiment.optimize
    num_training = len(problem.task.part("train"))
    num_calibration = min(experiment.num_calibration, num_training)
    dense_steps = 0 if dense_is_cached else dense.num_steps
    dense_seconds = dense_steps * (
        SECONDS_STEP + min(dense.batch_size, num_training) * example_seconds(problem, DENSE_STEP)
    )
    steps = budgeted.num_steps * (
        SECONDS_STEP + min(experiment.batch_size, num_training) * example_seconds(problem, STEP)
    )
    rounding = NUM_ROUNDING_RUNS * num_calibration * FORWARD_SHARE
    steps += num_fitted / num_points * rounding * example_seconds(problem, STEP)
    fitting = NUM_FITTING_RUNS * num_fitted
    measured = num_measured or num_runs * len(problem.task.part("validation"))
    examples = fitting * num_calibration + measured
    integer_path = (num_runs + fitting) * SECONDS_RUN
    integer_path += examples * example_seconds(problem, INTEGER_PATH)
    return num_seeds * (SECONDS_SETUP + dense_seconds + num_points * steps + integer_path)
