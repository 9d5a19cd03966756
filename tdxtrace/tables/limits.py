"""The tables about retry limits: busy answers, the attempts curve, policies replayed, limits."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.enums import Unit, View, names
from tdxtrace.tables.events import BOOL, I64, LEAF, SOURCE, TEXT, U32, U64
from tdxtrace.tables.schema import Column, Table

F64: Final = pl.Float64()
VIEWS: Final = names(View)
UNITS: Final = names(Unit)
MAKERS: Final = ("anyone", "host", "guest")
BASES: Final = ("observed", "nothing_busy", "extrapolated", "withheld")
MODELS: Final = ("geometric", "generalised_pareto")


# Times are told in steps of preferred numbers, ten a decade (ISO 3, series R10), from
# 100 ns, below which no trace clock tells SEAMCALLs apart, to some hours.
_R10: Final = (100, 125, 160, 200, 250, 315, 400, 500, 630, 800)
TIMES_NS: Final = (0, *(step * 10**decade for decade in range(11) for step in _R10))

_TD = Column("td_id", U64, "The TD; null unless the row is about one.", nullable=True)
_UNIT = Column("unit", pl.Enum(UNITS), "What is counted: attempts, or ns spent retrying.")
_REQUESTS = Column("n_requests", U64, "Requests of the leaf (and TD) in all.")

BUSY_ANSWERS = Table(
    name="busy_answers",
    grain="one row per attempt that was answered with a retryable status",
    key=("source", "seq"),
    columns=(
        SOURCE,
        Column("seq", U64, "seamcalls.seq of the attempt."),
        Column("first_seq", U64, "retry_chains.first_seq of its request."),
        LEAF,
        Column("number", U32, "Which busy answer of its request: 1 for the first."),
        Column("waited_ns", I64, "From the request's first attempt to this answer.", "ns"),
        Column("status", U64, "Completion status (RAX)."),
        Column("episode", U32, "The burst its request is in; unique within source and leaf."),
    ),
    rules={"answers are counted from one": pl.col("number") >= 1},
)

ATTEMPTS = Table(
    name="attempts",
    grain="one row per step of a curve: the share of requests done within so many attempts or ns",
    meaning="The curve of a leaf is the share of its requests that are done within so many "
    "attempts; requests that left sight before that are censored, not counted as done.",
    key=("leaf", "by", "td_id", "kind", "unit", "within"),
    columns=(
        LEAF,
        Column("by", pl.Enum(VIEWS), "What the curve is of: all requests of the leaf, or a part."),
        _TD,
        Column(
            "kind",
            TEXT,
            "The resource, cause or maker: the curve counts only busy answers of this kind.",
            nullable=True,
        ),
        _UNIT,
        Column("within", I64, "Attempts (the last included), or ns spent retrying."),
        _REQUESTS,
        Column("n_at_risk", U64, "Requests not done, and not lost from sight, before this step."),
        Column("n_done", U64, "Requests that got their answer, other than busy, at this step."),
        Column("n_censored", U64, "Requests last seen here, still busy: cut, or given up."),
        Column("done_ratio", F64, "Share done within so much (Kaplan-Meier)."),
        Column("done_low", F64, "Lower end of its 95 % interval."),
        Column("done_high", F64, "Upper end."),
        Column("n_episodes", U64, "Bursts in which a request needed more."),
        Column(
            "design_effect",
            F64,
            "How many requests tell as much as one would if each stood alone: 1, more in bursts.",
        ),
        Column("n_effective", F64, "Independent requests that tell as much as these."),
    ),
    rules={
        "a share lies in its interval": pl.col("done_ratio").is_between("done_low", "done_high"),
        "shares are shares": (pl.col("done_low") >= 0) & (pl.col("done_high") <= 1),
        "who leaves was there": pl.col("n_done") + pl.col("n_censored") <= pl.col("n_at_risk"),
    },
)

LATENCIES = Table(
    name="latencies",
    grain="one row per leaf: what a busy and a successful SEAMCALL cost, and the gap between tries",
    meaning="What a busy answer costs beside a success is the ratio of their median times; a pause "
    "runs from a busy answer to the request's next attempt.",
    key=("leaf",),
    columns=(
        LEAF,
        Column("n_busy", U64, "Busy answers whose beginning and end were seen."),
        Column("n_succeeded", U64, "Successes whose beginning and end were seen."),
        Column("busy_ns", F64, "Median time of a busy answer.", "ns", nullable=True),
        Column("succeeded_ns", F64, "Median time of a success.", "ns", nullable=True),
        Column("busy_ratio", F64, "Busy median over success median.", nullable=True),
        Column("busy_ratio_low", F64, "Lower end of its 95 % interval.", nullable=True),
        Column("busy_ratio_high", F64, "Upper end.", nullable=True),
        Column("n_gaps", U64, "Pauses from a busy answer to the next attempt."),
        Column("p50_gap_ns", I64, "Half of the pauses were no longer.", "ns", nullable=True),
        Column("p99_gap_ns", I64, "99 % of the pauses were no longer.", "ns", nullable=True),
        Column("max_gap_ns", I64, "Longest pause.", "ns", nullable=True),
        Column("withheld", TEXT, "Why there is no ratio, or how far it goes.", nullable=True),
    ),
)

POLICIES = Table(
    name="policies",
    grain="one row per policy and leaf: what the policy would have done with these requests",
    meaning="A policy says how often a caller tries, and what it does when that was not enough; "
    "here each is replayed on the requests that were recorded.",
    key=("policy", "leaf"),
    columns=(
        Column("policy", TEXT, "Its name."),
        LEAF,
        Column("calls", U32, "Most calls for one request; null: no limit.", nullable=True),
        Column("budget_ns", I64, "Most time for one request; null: none.", "ns", nullable=True),
        Column("rising", TEXT, "The adaptive loop: first limit, factor, end.", nullable=True),
        Column("kicks", BOOL, "Whether vCPUs are kicked out before the last call."),
        Column("then", TEXT, "What follows when that is not enough: kill, return or again."),
        _REQUESTS,
        Column("n_retried", U64, "Requests that met busy: the seed's retried_seamcalls."),
        Column("n_exceeding", U64, "Requests that needed more, and were seen to."),
        Column("n_undecided", U64, "Requests that left sight before the policy ends: not known."),
        Column("exceeding_ratio", F64, "Share of requests that need more.", nullable=True),
        Column("exceeding_low", F64, "Lower end of its 95 % interval.", nullable=True),
        Column("exceeding_high", F64, "Upper end.", nullable=True),
        Column("n_warnings", U64, "Warnings the adaptive loop prints."),
        Column("n_doublings", U64, "Times it raises its limit."),
        Column("raised", TEXT, "When, on the trace's clock, and to what.", nullable=True),
        Column("n_bugs", U64, "Requests at which the VM is declared dead."),
        Column("n_vms_killed", U64, "VMs (TD, else process) with such a request.", nullable=True),
        Column("waited_ns", I64, "Time spent retrying until done or stopped.", "ns"),
        Column("waited_low_ns", I64, "Lower end of its 95 % interval.", "ns"),
        Column("waited_high_ns", I64, "Upper end.", "ns"),
        Column("n_entries_left", U64, "SEPT entries left with host priority set."),
        Column("not_known", TEXT, "What replay cannot know, about this row."),
    ),
)

LIMITS = Table(
    name="limits",
    grain="one row per leaf, maker of the busy and unit: after how much a caller may stop",
    meaning="A limit is the smallest number of attempts for which the chance that a request needs "
    "more is below a target with stated confidence.",
    key=("leaf", "made_by", "unit"),
    columns=(
        LEAF,
        Column("made_by", pl.Enum(MAKERS), "Whose busy answers count; guest: the host is out."),
        _UNIT,
        Column("limit", I64, "Attempts, or ns of retrying; null: withheld.", nullable=True),
        Column("basis", pl.Enum(BASES), "What it rests on: counted, or a model of the tail."),
        Column("target", F64, "P(a request needs more) is to be no larger than this."),
        Column("confidence", F64, "How sure that is to be (one-sided)."),
        Column("exceed_ratio", F64, "Estimate of P(needs more than the limit).", nullable=True),
        Column("exceed_high", F64, "Its upper bound at the confidence.", nullable=True),
        Column("estimate", I64, "Where the estimate itself meets the target.", nullable=True),
        Column("estimate_low", I64, "Lower end of its two-sided interval.", nullable=True),
        Column("estimate_high", I64, "Upper end.", nullable=True),
        Column("model", pl.Enum(MODELS), "Of the tail, chosen by fit.", nullable=True),
        Column("shape", F64, "Its shape: 0 geometric, above: heavier.", nullable=True),
        Column("threshold", I64, "The tail is what needed more than this.", nullable=True),
        Column("goodness", F64, "p-value of the model's fit (chi-square).", nullable=True),
        _REQUESTS,
        Column("n_retried", U64, "Requests that met busy of this maker."),
        Column("n_busy", U64, "Busy answers of this maker."),
        Column("n_censored", U64, "Requests lost from sight while busy: cut, or given up."),
        Column("n_episodes", U64, "Bursts that the retried requests came in."),
        Column("design_effect", F64, "Requests that tell as much as one that stands alone."),
        Column("n_tds", U64, "TDs seen to use the leaf."),
        Column("observed_s", F64, "Time that was recorded.", unit="s", nullable=True),
        Column("max_seen", I64, "Most that any request was seen to need."),
        Column("n_losses", U64, "Things that were lost from the recording."),
        Column("needed_requests", U64, "About so many would let it be counted.", nullable=True),
        Column("reason", TEXT, "Why it is withheld, or what to beware of.", nullable=True),
        Column("would_change", TEXT, "What would change the answer."),
    ),
    rules={
        "withheld has no limit": (pl.col("basis") == "withheld") == pl.col("limit").is_null(),
        "withheld has a reason": (pl.col("basis") != "withheld") | pl.col("reason").is_not_null(),
        "a model is an extrapolation": (pl.col("basis") == "extrapolated")
        | pl.col("model").is_null(),
        "a limit keeps its target": (pl.col("exceed_high") <= pl.col("target")).fill_null(True),
    },
)
