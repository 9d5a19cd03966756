"""The tables about retry limits: busy answers, curves, replayed policies, limits, comparisons."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.enums import Dependence, Unit, View, names
from tdxtrace.tables.events import BOOL, I64, LEAF, SOURCE, TEXT, U16, U32, U64
from tdxtrace.tables.schema import Column, Table

F64: Final = pl.Float64()
VIEWS: Final = names(View)
UNITS: Final = names(Unit)
_DEPENDENCE: Final = Column(
    "unit_of_dependence",
    pl.Enum(names(Dependence)),
    "Clusters that give the design effect: requests (independent), bursts of them, periods (each a "
    "twentieth or a fifth of the recording), TDs or inputs; for a fleet, hosts. For TDs or inputs, "
    "or if the rate drifts, intervals are prediction intervals for one more of them.",
)
_DRIFTS: Final = Column(
    "drifts",
    BOOL,
    "Whether the share that needs more rises or falls over the recording by more than chance.",
)
# Least number of TDs, or inputs, for a prediction interval for one more of them: with Student's
# quantile of four degrees of freedom it is some four times as wide as a share.
MIN_UNITS: Final = 5
# Minimum number of episodes to estimate how episode sizes differ; with fewer, the design effect of
# the last step with enough is used, and limits are marked.  Ten is the minimum for cluster-robust
# variances (A. C. Cameron, D. L. Miller, J. Human Resources 50 (2015) 317: few is "less than 20"
# to "less than 50"; Student's quantile accounts for the difference).
MIN_EPISODES: Final = 10
MAKERS: Final = ("anyone", "host", "guest")
BASES: Final = ("observed", "nothing_busy", "no_vm_lost", "extrapolated", "withheld")
MODELS: Final = ("geometric", "generalised_pareto")
STATEMENTS: Final = ("asked", "smallest")
CHANGES: Final = ("more", "fewer", "not_told", "only_before", "only_after")


# Times at which curves are evaluated: preferred numbers, ten per decade (ISO 3, series R10), from
# 100 ns, below which no trace clock resolves a SEAMCALL, to some hours.
_R10: Final = (100, 125, 160, 200, 250, 315, 400, 500, 630, 800)
TIMES_NS: Final = (0, *(step * 10**decade for decade in range(11) for step in _R10))

_TD = Column("td_id", U64, "The TD; null unless by is td.", nullable=True)
_UNIT = Column("unit", pl.Enum(UNITS), "Unit: attempts, or ns spent retrying.")
_REQUESTS = Column("n_requests", U64, "All requests of the leaf (and TD).")

BUSY_ANSWERS = Table(
    name="busy_answers",
    grain="one row per attempt that was answered with a retryable status",
    key=("source", "seq"),
    columns=(
        SOURCE,
        Column("seq", U64, "seamcalls.seq of the attempt."),
        Column("first_seq", U64, "retry_chains.first_seq of its request."),
        LEAF,
        Column("number", U32, "Ordinal of the busy answer within its request, from 1."),
        Column("waited_ns", I64, "Time from the request's first attempt to this answer.", "ns"),
        Column("status", U64, "Completion status (RAX)."),
        Column("episode", U32, "Burst of the request; unique within source and leaf."),
    ),
    rules={"number starts at 1": pl.col("number") >= 1},
)

ATTEMPTS = Table(
    name="attempts",
    grain="one row per step of a curve: share of requests done within a number of attempts or ns",
    meaning="A curve gives the share of a leaf's requests that are done within a number of "
    "attempts (or ns); requests whose end was not observed are censored, not counted as done.",
    key=("leaf", "by", "source", "td_id", "kind", "unit", "within"),
    columns=(
        LEAF,
        Column(
            "by",
            pl.Enum(VIEWS),
            "How the leaf's requests or busy answers are grouped into curves.",
        ),
        Column("source", U16, "Input of the TD; null unless by is td.", nullable=True),
        _TD,
        Column(
            "kind",
            TEXT,
            "The resource, cause or maker; only busy answers of this kind count.",
            nullable=True,
        ),
        _UNIT,
        Column("within", I64, "Attempts including the last, or ns spent retrying."),
        _REQUESTS,
        Column("n_at_risk", U64, "Requests neither done nor censored before this step."),
        Column("n_done", U64, "Requests that got an answer other than busy at this step."),
        Column("n_censored", U64, "Requests last observed busy at this step: cut or given up."),
        Column("done_ratio", F64, "Share of requests done by this step (Kaplan-Meier)."),
        Column("done_low", F64, "Lower end of its 95 % confidence interval."),
        Column("done_high", F64, "Upper end."),
        Column("n_episodes", U64, "Bursts in which a request needed more than this."),
        Column(
            "design_effect",
            F64,
            "Variance relative to independent requests: 1 if independent, more in bursts.",
        ),
        _DEPENDENCE,
        _DRIFTS,
        Column("n_effective", F64, "Effective sample size, in independent requests."),
    ),
    rules={
        "done_ratio is within its interval": pl.col("done_ratio").is_between(
            "done_low", "done_high"
        ),
        "shares are from 0 to 1": (pl.col("done_low") >= 0) & (pl.col("done_high") <= 1),
        "done and censored requests were at risk": pl.col("n_done") + pl.col("n_censored")
        <= pl.col("n_at_risk"),
    },
)

LATENCIES = Table(
    name="latencies",
    grain="one row per leaf: duration of busy and successful SEAMCALLs, and of pauses between them",
    meaning="The relative cost of a busy answer is its median time over that of a success; a pause "
    "is the time from a busy answer to the request's next attempt.",
    key=("leaf",),
    columns=(
        LEAF,
        Column("n_busy", U64, "Busy answers with both entry and return recorded."),
        Column("n_succeeded", U64, "Successes with both entry and return recorded."),
        Column("busy_ns", F64, "Median time of a busy answer.", "ns", nullable=True),
        Column("succeeded_ns", F64, "Median time of a success.", "ns", nullable=True),
        Column("busy_ratio", F64, "Busy median over success median.", nullable=True),
        Column("busy_ratio_low", F64, "Lower end of its 95 % confidence interval.", nullable=True),
        Column("busy_ratio_high", F64, "Upper end.", nullable=True),
        Column("n_gaps", U64, "Pauses from a busy answer to the next attempt."),
        Column("p50_gap_ns", I64, "Median pause.", "ns", nullable=True),
        Column("p99_gap_ns", I64, "99th percentile of the pauses.", "ns", nullable=True),
        Column("max_gap_ns", I64, "Longest pause.", "ns", nullable=True),
        Column("withheld", TEXT, "Why the ratio is missing, or its limitations.", nullable=True),
    ),
)

POLICIES = Table(
    name="policies",
    grain="one row per policy and leaf: outcome of replaying the policy on the recorded requests",
    meaning="A policy is the number of attempts (or time) that a caller allows a request, and the "
    "action when it is exceeded; each policy is replayed on the recorded requests.",
    key=("policy", "leaf"),
    columns=(
        Column("policy", TEXT, "Name of the policy."),
        LEAF,
        Column("calls", U32, "Maximum calls for one request; null: no limit.", nullable=True),
        Column(
            "budget_ns", I64, "Maximum time for one request; null: no limit.", "ns", nullable=True
        ),
        Column("rising", TEXT, "Doubling limit: first limit, factor, end.", nullable=True),
        Column("kicks", BOOL, "Whether vCPUs are kicked before the last call."),
        Column("then", TEXT, "Action when the limit is exceeded: kill, return or again."),
        _REQUESTS,
        Column("n_retried", U64, "Requests answered busy at least once."),
        Column("n_exceeding", U64, "Requests recorded to need more than the policy allows."),
        Column(
            "n_dependent",
            U64,
            "Of n_exceeding, those recorded after the policy would have given up an earlier "
            "request of the VM: its later calls would differ, and may not have been busy.",
        ),
        Column(
            "n_undecided",
            U64,
            "Requests for which the recording does not show whether they need more: their end was "
            "not observed, it depends on a kick or on the pace of the calls, or the VM would have "
            "been dead.",
        ),
        Column(
            "exceeding_ratio",
            F64,
            "Share of requests that need more; null: withheld, only the interval is known, as "
            "n_dependent or n_undecided is not 0.",
            nullable=True,
        ),
        Column(
            "exceeding_low",
            F64,
            "Lower end of the 95 % prediction interval for that share in another run of the same "
            "length, in whole requests; counts no dependent or undecided request.",
        ),
        Column("exceeding_high", F64, "Upper end; counts all dependent and undecided requests."),
        Column("n_warnings", U64, "Warnings printed by the doubling limit."),
        Column("n_doublings", U64, "Times the doubling limit is raised."),
        Column("raised", TEXT, "Times (trace clock) and new values of the limit.", nullable=True),
        Column("n_bugs", U64, "Requests at which the VM is marked dead (KVM_BUG)."),
        Column(
            "n_vms_killed", U64, "VMs (by TD, else by process) with such a request.", nullable=True
        ),
        Column("waited_ns", I64, "Total time spent retrying until done or stopped.", "ns"),
        Column("waited_low_ns", I64, "Lower end of its 95 % confidence interval.", "ns"),
        Column("waited_high_ns", I64, "Upper end.", "ns"),
        Column("n_entries_left", U64, "SEPT entries left with host priority set."),
        Column("not_known", TEXT, "What the replay cannot determine for this row."),
    ),
)

LIMITS = Table(
    name="limits",
    grain="one row per leaf, maker of busy answers and unit: recommended retry limit",
    meaning="A limit is the smallest number of attempts for which the chance that a request needs "
    "more is below a target with stated confidence.",
    key=("leaf", "made_by", "unit"),
    columns=(
        LEAF,
        Column(
            "made_by",
            pl.Enum(MAKERS),
            "Whose busy answers count: anyone's, the host's or the guest's.",
        ),
        _UNIT,
        Column(
            "limit",
            I64,
            "Recommended limit: attempts, or ns of retrying; null: withheld.",
            nullable=True,
        ),
        Column(
            "basis",
            pl.Enum(BASES),
            "Basis: observed counts (nothing_busy: no request was busy); no_vm_lost (for a rate of "
            "VMs): KVM loses no VM at any limit; or a model of the tail, valid only if the "
            "unobserved tail follows it.",
        ),
        Column("target", F64, "Maximum probability that a request needs more."),
        Column("confidence", F64, "One-sided confidence required; a model does not provide it."),
        Column(
            "exceed_ratio",
            F64,
            "Estimated probability that a request needs more than the limit.",
            nullable=True,
        ),
        Column(
            "exceed_high",
            F64,
            "Upper bound of exceed_ratio at the confidence; null: a model has none.",
            nullable=True,
        ),
        Column(
            "estimate", I64, "Limit at which the point estimate meets the target.", nullable=True
        ),
        Column(
            "estimate_low", I64, "Lower end of its two-sided confidence interval.", nullable=True
        ),
        Column("estimate_high", I64, "Upper end.", nullable=True),
        Column("model", pl.Enum(MODELS), "Model of the tail, chosen by fit.", nullable=True),
        Column(
            "shape", F64, "Shape of the tail: 0 is geometric, larger is heavier.", nullable=True
        ),
        Column(
            "threshold",
            I64,
            "Start of the tail: requests that needed more than this.",
            nullable=True,
        ),
        Column("goodness", F64, "p-value of the goodness of fit (chi-square).", nullable=True),
        _REQUESTS,
        Column(
            "n_unanswered",
            U64,
            "Requests that are not counted: no answer was recorded, or (host, guest) they were "
            "last seen busy because of others.",
        ),
        Column(
            "n_begin_lost",
            U64,
            "Requests left out, because attempts before the first recorded one may be missing.",
        ),
        Column("n_retried", U64, "Requests answered busy because of this maker."),
        Column("n_busy", U64, "Busy answers because of this maker."),
        Column("n_censored", U64, "Requests last observed busy: cut or given up."),
        Column("n_episodes", U64, "Bursts of retried requests."),
        Column("design_effect", F64, "Variance relative to independent requests."),
        _DEPENDENCE,
        _DRIFTS,
        Column(
            "worst_td",
            U64,
            "The TD with the largest share of requests that needed more than the limit (if "
            "withheld, more than one attempt or 0 ns); null: no TD is known, or only some busy "
            "answers count.",
            nullable=True,
        ),
        Column("worst_td_source", U16, "Input of that TD.", nullable=True),
        Column("worst_td_ratio", F64, "Share of its requests that needed more.", nullable=True),
        Column(
            "worst_source",
            U16,
            "The input with the largest share of requests, of known TDs, that needed more; null: "
            "only one input.",
            nullable=True,
        ),
        Column("worst_source_ratio", F64, "Share of them that needed more.", nullable=True),
        Column(
            "recorded_calls",
            U32,
            "Calls per request at which the recorded kernel gave up or kicked the vCPUs; null: no "
            "such limit is visible, or not in all inputs.",
            nullable=True,
        ),
        Column("recorded_policy", TEXT, "The same in words, with its consequence.", nullable=True),
        Column("n_tds", U64, "TDs observed to use the leaf, of all inputs."),
        Column("observed_s", F64, "Length of the recording.", unit="s", nullable=True),
        Column("max_seen", I64, "Maximum that a request was observed to need."),
        Column(
            "pace_ns",
            F64,
            "Median time from one attempt of a retried request to the next, in this trace: probes "
            "make it longer than on a bare kernel, so that fewer attempts fit into the same wait.",
            unit="ns",
            nullable=True,
        ),
        Column(
            "bare_attempts",
            I64,
            "Attempts that fit into a limit in ns at the pace given for a bare kernel; null: none "
            "was given.",
            nullable=True,
        ),
        Column("n_losses", U64, "Losses of the recording."),
        Column(
            "needed_requests",
            U64,
            "Approximate number of requests needed for an observed limit in at least 90 % of "
            "recordings; null: the limit is observed, or no number would suffice.",
            nullable=True,
        ),
        Column(
            "needed_s",
            F64,
            "Time in which the recorded workload makes needed_requests.",
            unit="s",
            nullable=True,
        ),
        Column("reason", TEXT, "Why the limit is withheld, or a warning.", nullable=True),
        Column("would_change", TEXT, "Changes that may change the limit."),
    ),
    rules={
        "withheld has no limit": (pl.col("basis") == "withheld") == pl.col("limit").is_null(),
        "withheld has a reason": (pl.col("basis") != "withheld") | pl.col("reason").is_not_null(),
        "a model is an extrapolation": (pl.col("basis") == "extrapolated")
        | pl.col("model").is_null(),
        "exceed_high is at most the target": (pl.col("exceed_high") <= pl.col("target")).fill_null(
            True
        ),
    },
)

LIMIT_STATEMENTS = Table(
    name="limit_statements",
    grain="one row per leaf, unit and number: the share of requests that need more, at most",
    meaning="Statements that the trace supports without a target: at most this share of requests "
    "needs more than a number of attempts or ns, each with its confidence.",
    key=("leaf", "unit", "kind", "within"),
    columns=(
        LEAF,
        _UNIT,
        Column(
            "kind",
            pl.Enum(STATEMENTS),
            "asked: for a number given in advance; smallest: for the limit of the smallest share "
            "that counts support.",
        ),
        Column("within", I64, "Attempts including the last, or ns spent retrying."),
        Column("more_ratio", F64, "Estimated share of requests that need more."),
        Column("more_high", F64, "At most this share needs more; 1: nothing is supported."),
        Column("confidence", F64, "One-sided confidence of each row alone."),
        _REQUESTS,
        Column("n_retried", U64, "Requests answered busy."),
        _DRIFTS,
        Column("max_seen", I64, "Maximum that a request was observed to need."),
    ),
    rules={
        "shares are from 0 to 1": pl.col("more_high").is_between(0, 1),
        "more_ratio is at most more_high": pl.col("more_ratio") <= pl.col("more_high"),
    },
)

COMPARISONS = Table(
    name="comparisons",
    grain="one row per leaf and number of attempts or ns: shares of requests that needed more",
    meaning="A difference between two traces is reported only if its 95 % confidence interval, "
    "which allows for busy answers in bursts, excludes zero.",
    key=("leaf", "unit", "within"),
    columns=(
        LEAF,
        Column("unit", pl.Enum(UNITS), "Unit: attempts, or ns spent retrying."),
        Column("within", I64, "Attempts including the last, or ns."),
        Column("n_before", U64, "Requests before; null: the leaf was not recorded.", nullable=True),
        Column("n_after", U64, "Requests after; null: the leaf was not recorded.", nullable=True),
        Column("more_before", F64, "Share of requests that needed more, before.", nullable=True),
        Column("more_after", F64, "Share of requests that needed more, after.", nullable=True),
        Column("difference", F64, "more_after - more_before.", nullable=True),
        Column("difference_low", F64, "Lower end of its 95 % interval.", nullable=True),
        Column("difference_high", F64, "Upper end.", nullable=True),
        Column("change", pl.Enum(CHANGES), "The significant change; not_told: no significant one."),
    ),
    rules={
        "difference is within its interval": pl.col("difference").is_between(
            "difference_low", "difference_high"
        ),
    },
)
