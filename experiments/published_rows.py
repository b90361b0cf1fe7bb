"""The published figures of the baselines, and why ours differ; what is measured stands in the record of the study.

References:
  SpAtten: arXiv 2012.09852, a published review of it, and repository mit-han-lab/spatten. A3: arXiv 2002.10941, by a
  published critique. Sanger: MICRO 2021, by reading notes, and repository hatsu3/Sanger. Computation of attention that is
  saved: Wang et al., "SOFA", arXiv 2407.10416, Table II, which prints it for each machine beside a loss.
"""

from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["percent", "times", "ms", "gops", "loss"]
AS_ABOVE = "as above"
UNTRAINED = "the dense model as it is: nothing was fine-tuned"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published figure.

    Attributes:
      mechanism: The machine that it is of.
      quantity: What it is.
      figure: Name of ours in the record; beside one that ends in `saved` stands the `loss` of the same setting.
      form: `percent` and `loss` are stored as fractions, a loss of a decoder in bits per token.
      why: Why ours differs.
      published: The figure, or a lowest and a highest; empty: none is published.
      published_loss: The loss beside it; None: none is given.
      workload: Models and data of the published one.
      source: Where it is published.
    """

    mechanism: str
    quantity: str
    figure: str
    form: Form
    why: str
    published: tuple[float, ...] = ()
    published_loss: float | None = None
    workload: str = ""
    source: str = ""


_REVIEW: dict[str, Any] = {
    "published": (0.059,),
    "workload": "mean of 30 benchmarks",
    "source": "review of arXiv 2012.09852",
}
_RUNS: dict[str, Any] = {
    "published": (0.07,),
    "workload": "GPT-2 small on WikiText-2, 6 + 4 bit",
    "source": "repository mit-han-lab/spatten",
}
_BYTES: dict[str, Any] = {
    "form": "times",
    "published": (10.0,),
    "workload": "mean of 30 benchmarks",
    "source": "arXiv 2012.09852",
}
_MACS: dict[str, Any] = _BYTES | {"published": (2.1,)}


def _saved(share: float, loss: float) -> dict[str, Any]:
    """Returns what Table II has of a machine."""
    return {
        "form": "percent",
        "published": (share,),
        "published_loss": loss,
        "workload": "the paper's own",
        "source": "arXiv 2407.10416, Table II",
    }


def _gops(value: float) -> dict[str, Any]:
    """Returns what is printed of a throughput."""
    return {
        "form": "gops",
        "published": (value,),
        "workload": "at 128 multipliers",
        "source": "reading notes of Sanger",
    }


def _spatten(quantity: str, figure: str, why: str, **published: Any) -> Row:
    fields = {"form": "percent"} | published
    return Row(
        mechanism="SpAtten", quantity=quantity, figure=f"spatten.{figure}", why=why, **fields
    )


SPATTEN_ROWS = (
    _spatten(
        "rows that read low bits too, threshold 0.1, 6 + 4 bit, nothing pruned",
        "6+4.0.1.reread",
        "those whose largest probability is below the threshold: how flat attention is, which differs from head to head",
        **_REVIEW,
    ),
    _spatten(
        "the same, 8 + 4 bit",
        "8+4.0.1.reread",
        "as above: two bits more of a score hardly change which rows are flat",
        **_REVIEW,
    ),
    _spatten(
        "the same, threshold 0.05, 6 + 4 bit",
        "6+4.0.05.reread",
        "as above: rows are seldom so flat here",
        **_RUNS,
    ),
    _spatten("the same, 8 + 4 bit", "8+4.0.05.reread", AS_ABOVE, **_RUNS),
    _spatten(
        "the same, threshold 0.1, 8 + 4 bit, start of the policy: 5 % of tokens and 3 % of heads go in each layer",
        "start.reread",
        "fewer keys have larger probabilities",
        **_REVIEW,
    ),
    _spatten(
        "keys kept of 1024, GPT-2 small",
        "gpt2_small",
        "shares are stored in the nearest 1/1024 here, keys rounded down there",
        published=((921 + 716 + 4 * 204 + 6 * 102) / 12 / 1024,),
        workload="921, 716, 4 x 204, 6 x 102 by layer",
        source="repository mit-han-lab/spatten",
    ),
    _spatten(
        "keys kept of 1024, GPT-2 medium",
        "gpt2_medium",
        AS_ABOVE,
        published=((2 * 1024 + 921 + 2 * 819 + 6 * 614 + 13 * 307) / 24 / 1024,),
        workload="2 x 1024, 921, 2 x 819, 6 x 614, 13 x 307",
        source="repository mit-han-lab/spatten",
    ),
    _spatten(
        "bytes of dense over pruned: keys and values for one query, GPT-2 small by that schedule, 10 bit dense",
        "gpt2_small.bytes_times",
        "one of the 30; how wide the dense one's are is not said",
        **_BYTES,
    ),
    _spatten(
        "the same, all of attention, start of the policy, 12 bit dense",
        "start.bytes_times",
        "all queries share one reading of the keys, and some query wants nearly each; queries and outputs move all the "
        "same. GPT-2 reads its keys again for every token that it makes",
        **_BYTES,
    ),
    _spatten(
        "the same, tokens falling to 0.3, heads to 0.6, 0.2 of the values",
        "strong.bytes_times",
        AS_ABOVE,
        **_BYTES,
    ),
    _spatten(
        "multiplications of dense over pruned: GPT-2 small by that schedule",
        "gpt2_small.macs_times",
        "of 1024 tokens most can go; the mean is of short texts too",
        **_MACS,
    ),
    _spatten(
        "the same, start of the policy",
        "start.macs_times",
        "three or four layers, the first of which keeps all, leave a cascade little; rows that read low bits count twice",
        **_MACS,
    ),
    _spatten(
        "computation saved, start of the policy",
        "start.saved",
        f"as above; {UNTRAINED}. A decoder's newest tokens have got least attention and go first",
        **_saved(0.67, 0.009),
    ),
    _spatten(
        "computation saved, tokens falling to 0.3, heads to 0.6, 0.2 of the values",
        "strong.saved",
        f"shares were set, not found; {UNTRAINED}",
        **_saved(0.67, 0.009),
    ),
    _spatten(
        "throughput, start of the policy",
        "start.gops",
        "little is pruned; heads of 32 or 16 leave a half or three quarters of 64 multipliers idle",
        **_gops(360.0),
    ),
)

_KEPT = {
    2e-3: ((0.15, 0.35), "GPT-2 (0.002)"),
    1e-2: ((0.23, 0.54), "BART (0.01)"),
    2e-2: ((0.087, 0.331), "BERT-base (0.02, 0.002)"),
}
_NOTES: dict[str, Any] = {"form": "percent", "source": "reading notes of Sanger"}


def _sanger(tau: float, quantity: str, figure: str, why: str, **published: Any) -> Row:
    return Row(
        mechanism="Sanger",
        quantity=f"{quantity}, threshold {tau:g}",
        figure=f"sanger.{tau:g}.{figure}",
        why=why if tau == 2e-3 else AS_ABOVE,
        **published,
    )


SANGER_ROWS = (
    *(
        _sanger(
            tau,
            "kept pairs",
            "kept",
            "the threshold is absolute, so that it drops less of few keys: the mean probability is one over their number; "
            "models were fine-tuned with their masks there",
            published=kept,
            workload=models,
            **_NOTES,
        )
        for tau, (kept, models) in _KEPT.items()
    ),
    *(
        _sanger(
            tau,
            "utilisation without pack and split",
            "lockstep",
            "reconstruction: 64 rows in lock step on 64 keys, as long as the row with most pairs there",
            published=(0.33, 0.59),
            workload="BERT, GPT-2, BART",
            **_NOTES,
        )
        for tau in _KEPT
    ),
    *(
        _sanger(
            tau,
            "utilisation with pack and split",
            "packed",
            "follows from what is kept: more pairs of a piece of 64 keys fill segments of 16 better",
            published=(0.56, 0.74),
            workload="BERT, GPT-2, BART",
            **_NOTES,
        )
        for tau in _KEPT
    ),
    *(
        _sanger(
            tau,
            "computation saved",
            "saved",
            f"follows from what is kept; {UNTRAINED}",
            **_saved(0.76, 0.0),
        )
        for tau in _KEPT
    ),
    Row(
        mechanism="Sanger",
        quantity="latency of a layer, n = 384, h = 768; of tasks at what threshold 0.002 keeps and uses",
        figure="sanger.latency",
        form="ms",
        published=(0.822,),
        workload="kept 0.25, utilisation 0.7",
        source="repository hatsu3/Sanger",
        why="the formula is the same; of tasks, what they keep and use",
    ),
    Row(
        mechanism="Sanger",
        quantity="the same, the output projection at its full time",
        figure="sanger.latency_corrected",
        form="ms",
        why="a projection has no mask: the published formula is too fast",
    ),
    *(
        _sanger(
            tau,
            "throughput",
            "gops",
            "what is kept; heads of 32 or 16 leave a half or three quarters of the array idle",
            **_gops(529.0),
        )
        for tau in (2e-3, 2e-2)
    ),
    *(
        _sanger(
            tau,
            f"throughput over {other}'s",
            f"over_{name}",
            why,
            form="times",
            published=(value,),
            workload=f"529 over {printed} GOPS",
            source="reading notes of Sanger",
        )
        for other, name, value, printed, why in (
            (
                "A3",
                "a3",
                2.39,
                221,
                "A3's 221 GOPS are fewer than 128 multipliers do without any search; here its n / 2 steps a row take "
                "longest and hide everything else, and rows of a decoder, of n / 2 keys in the mean, gain nothing",
            ),
            ("SpAtten", "spatten", 1.47, 360, "what either keeps here"),
        )
        for tau in (2e-3, 2e-2)
    ),
)


def _a3(quantity: str, figure: str, why: str, **published: Any) -> Row:
    return Row(mechanism="A3", quantity=quantity, figure=f"a3.{figure}", why=why, **published)


_A3 = {
    "conservative": "conservative (n / 2 steps, 5 %)",
    "aggressive": "aggressive (n / 8 steps, 10 %)",
}
_LOSSES = {"conservative": (0.01, 0.016), "aggressive": (0.08, 0.09)}

A3_ROWS = (
    *(
        _a3(
            f"candidates of all pairs, {text}",
            f"{name}.candidates",
            "none is published; steps are the nearest power of two",
            form="percent",
        )
        for name, text in _A3.items()
    ),
    *(
        _a3(
            f"kept of all pairs, {text}",
            f"{name}.kept",
            AS_ABOVE,
            form="percent",
        )
        for name, text in _A3.items()
    ),
    *(
        _a3(
            f"computation saved, {text}",
            f"{name}.saved",
            "at which setting, and what counts, is not said; here scores of candidates and values of what is kept",
            **_saved(0.40, 0.053),
        )
        for name, text in _A3.items()
    ),
    *(
        _a3(
            f"the same, less the products of the search, {text}",
            f"{name}.saved_all",
            AS_ABOVE,
            **_saved(0.40, 0.053),
        )
        for name, text in _A3.items()
    ),
    *(
        _a3(
            f"loss, {text}",
            f"{name}.loss",
            "other models and data; no fine-tuning there or here",
            form="loss",
            published=_LOSSES[name],
            workload="MemN2N, BERT",
            source="critique of arXiv 2002.10941",
        )
        for name, text in _A3.items()
    ),
    _a3(
        "throughput, conservative",
        "conservative.gops",
        "as Sanger's over A3's; heads of 32 or 16 leave a half or three quarters of 64 multipliers idle",
        **_gops(221.0),
    ),
)

_TRAINED = "trained, least energy at a point lost (a comparison's)"


def _other(mechanism: str, setting: str, text: str, why: str) -> Row:
    return Row(
        mechanism=mechanism,
        quantity=f"computation saved, {text}",
        figure=f"{mechanism.lower()}.{setting}.saved",
        why=why,
        **(_saved(0.79, 0.0) if mechanism == "FACT" else _saved(0.77, 0.009)),
    )


OTHER_ROWS = (
    _other(
        "FACT",
        "start",
        "start of the policy: a quarter of the keys, one-hot from a lead of 3",
        f"the share that a new policy keeps, since no row of several keys is one-hot; {UNTRAINED}",
    ),
    _other(
        "FACT",
        "equal_quality",
        _TRAINED,
        "energy end to end is what is trained for, in which widths count for more than pairs",
    ),
    _other(
        "Energon",
        "start",
        "start of the policy: both thresholds at the mean",
        "two thresholds at the mean leave about a fifth of most rows, which is why they are the start; what is measured is "
        f"the loss: {UNTRAINED}",
    ),
    _other("Energon", "equal_quality", _TRAINED, "one small task, trained with its thresholds"),
)

ROWS: tuple[Row, ...] = (*SPATTEN_ROWS, *SANGER_ROWS, *A3_ROWS, *OTHER_ROWS)
"""In the order of the table."""
