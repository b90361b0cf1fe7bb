"""The closed vocabulary of counts, shared by models, machines and NumPy-only readers; imports no JAX."""

from fnmatch import fnmatchcase

from codesign.errors import UnknownNameError

LINEAR_SITES = ("embed", "qkv", "out", "up", "down", "pool", "head")
"""Linear layers with a weight; `embed`, `pool` and `head` stand outside the scanned blocks."""
BLOCK_SITES = ("qkv", "out", "up", "down")
"""Those of a block."""

SITES = (
    *("qkv", "query", "key", "value", "scores", "probabilities"),
    *("attention", "out", "attention_branch", "up", "gelu", "down", "ffn_branch"),
)
"""Tensors of a block in order: by where they enter, or (`attention`, the branches) by what they leave."""

STAGES = (
    "predict",  # estimate of Q, K or scores before they exist
    "encode",  # conversion of operands to a code (leading one, HLog)
    "filter",  # rounds of score filtering; written filter0, filter1, ...
    "threshold",  # evaluation of a threshold
    "select",  # top-k networks and bisection
    "similarity",  # comparison of rows
    "generate",  # K, V (and Q) rows made on demand
    "qk",  # exact scores
    "softmax",
    "pv",  # probabilities times values
    "output",  # final scaling of a row
    "index",  # lists of kept keys
    "fetch",  # rows read from a memory on chip
    "copy",  # reuse of a row's result
    "ffn",  # reuse of a feed-forward row
)
LINEAR_STAGES = ("generate", "ffn")
"""Stages that belong to the linear layers and count end to end only, as do streams named `<stage>_...`."""
KINDS = (
    "mac",
    "shift_add",
    "add",
    "statistic",  # running maximum, minimum and sum of one score: three operations
    "compare",
    "evaluate",
    "exp",
    "reciprocal",
    "divide",
    "multiply",
    "encode",
    "bits",  # bits written and read again
    "bytes",  # bytes written or read
)

ATTENTION_OPERATIONS = (
    "qk.mac",
    "softmax.exp",
    "softmax.reciprocal",
    "pv.mac",
    "output.multiply",
)
MECHANISM_OPERATIONS: dict[str, tuple[str, ...]] = {
    "dense": ATTENTION_OPERATIONS,
    "energon": (
        "filter*.mac",
        "filter*.statistic",
        "filter*.compare",
        "threshold.evaluate",
        "index.bits",
        *ATTENTION_OPERATIONS,
    ),
    "acceltran": ATTENTION_OPERATIONS,
    "sofa": (
        "predict.shift_add",
        "encode.encode",
        "filter0.shift_add",
        "select.compare",
        "threshold.compare",
        "generate.mac",
        "qk.mac",
        "softmax.exp",
        "softmax.add",
        "softmax.compare",
        "softmax.multiply",
        "pv.mac",
        "output.divide",
    ),
    "lapa": (
        "predict.shift_add",
        "encode.encode",
        "filter*.shift_add",
        "filter*.statistic",
        "filter*.compare",
        "generate.mac",
        "qk.mac",
        "softmax.exp",
        "pv.mac",
        "output.divide",
    ),
    "esact": (
        "encode.encode",
        "predict.shift_add",
        "filter0.shift_add",
        "select.compare",
        "similarity.add",
        "generate.mac",
        "generate.bytes",
        "fetch.bytes",
        "qk.mac",
        "softmax.exp",
        "pv.mac",
        "output.divide",
        "copy.bytes",
        "ffn.bytes",
    ),
    "topk": (*ATTENTION_OPERATIONS, "select.compare"),
    "bitserial": (
        "filter*.mac",
        "filter*.compare",
        "threshold.evaluate",
        *(key for key in ATTENTION_OPERATIONS if key != "qk.mac"),
    ),
    "sanger": (*ATTENTION_OPERATIONS, "filter0.mac", "filter0.exp", "threshold.compare"),
    "a3": (*ATTENTION_OPERATIONS, "predict.multiply", "predict.compare", "threshold.compare"),
    "spatten": (
        *ATTENTION_OPERATIONS,
        "filter0.mac",
        "threshold.compare",
        "select.compare",
    ),
    "fact": (
        "encode.encode",
        "predict.shift_add",
        "filter0.shift_add",
        "select.compare",
        "threshold.compare",
        "generate.mac",
        "qk.mac",
        "softmax.exp",
        "pv.mac",
        "output.divide",
    ),
}
"""The registry of mechanisms, and the operations that each feeds to its machine; `*` stands for a round's number.

It stands here, and not beside the mechanisms, because readers without JAX check machines against it. A listed name is a
file of `codesign.mechanisms` and one of `codesign.references`.
"""

LINEAR_MAC = "linear.mac"
"""A product of a linear layer, on a machine that runs them on its own units."""
LINEAR_OPERATIONS = (LINEAR_MAC, "norm.element", "activation.element")
"""What a machine without a host executes besides: dense products, elements of norms and of non-linearities.

Their counts follow from a workload's dense products; no mechanism counts them.
"""


def check_key(key: str) -> str:
    """Returns `key` if it is `stage.kind` of the closed vocabulary (a round number may follow `filter`).

    Raises:
      UnknownNameError: If it is not.
    """
    stage, _, kind = key.partition(".")
    if stage.rstrip("0123456789") not in STAGES or kind not in KINDS:
        raise UnknownNameError(
            f"operation `{key}` is not in the workload's vocabulary: use <stage>.<kind> with a stage of "
            f"{', '.join(STAGES)} and a kind of {', '.join(KINDS)}"
        )
    return key


def matches(key: str, patterns: tuple[str, ...]) -> bool:
    """Whether an operation's key matches one of the patterns (`*` for any text)."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)
