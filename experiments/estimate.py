"""Expected wall time of training runs and curves, for people who plan."""

from codesign.experiments.problem import Problem

# Measured on two cores with digits: 64 tokens, 3 layers, 2 heads, 32 images per step. Seconds per step of the dense model,
# per step under a budget, per measured setting, and for loading, compiling and finding the start point.
SECONDS_DENSE_STEP = 0.03
SECONDS_STEP = 0.14
SECONDS_SETTING = 0.4
SECONDS_SETUP = 60.0
MEASURED_SIZE = 64 * 3 * 2
MEASURED_BATCH_SIZE = 32


def estimate_seconds(
    problem: Problem, *, num_points: int = 1, num_settings: int = 1, num_seeds: int = 1
) -> float:
    """Returns the expected time on two cores, s, the dense models included.

    Work grows with tokens times layers times heads, and that of a step with its images; set-up does not grow.

    Args:
      problem: Sizes of the model, steps and images per step; its outline is enough.
      num_points: Points trained under a budget with one seed.
      num_settings: Settings measured with one seed.
      num_seeds: Seeds.
    """
    experiment, structure = problem.experiment, problem.config.structure
    size = structure.max_tokens * structure.num_layers * structure.num_heads / MEASURED_SIZE
    dense, budgeted = (
        settings.num_steps * batch_size / MEASURED_BATCH_SIZE
        for settings, batch_size in (
            (experiment.dense, experiment.dense.batch_size),
            (experiment.optimize, experiment.batch_size),
        )
    )
    work = (
        dense * SECONDS_DENSE_STEP
        + num_points * budgeted * SECONDS_STEP
        + num_settings * SECONDS_SETTING
    )
    return num_seeds * (SECONDS_SETUP + size * work)
