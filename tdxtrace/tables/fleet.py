"""The fleet tables: counts of each trace, which can be summed over traces, hosts and days."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.enums import Counted, names
from tdxtrace.tables.events import BOOL, I64, LEAF, TEXT, U16, U32, U64
from tdxtrace.tables.limits import F64, UNITS, VIEWS
from tdxtrace.tables.schema import Column, Table

# Units of dependence whose clusters include requests that were never busy; bursts do not.
CLUSTERED_BY: Final = ("period", "stretch", "td", "source")

_INPUT = Column("source", U16, "Input of the TD; null unless by is td.", nullable=True)
_TD = Column("td_id", U64, "The TD; null unless by is td.", nullable=True)

ATTEMPT_COUNTS = Table(
    name="attempt_counts",
    grain="one row per curve of attempts and step: sums over the requests that end at this step",
    meaning="The sums that curves of attempts are computed from; sums of several inputs add.",
    key=("leaf", "by", "source", "td_id", "kind", "unit", "settled", "step"),
    columns=(
        LEAF,
        Column("by", pl.Enum(VIEWS), "Part of the requests or busy answers, as in attempts."),
        _INPUT,
        _TD,
        Column("kind", TEXT, "The resource, cause or maker, as in attempts.", nullable=True),
        Column("unit", pl.Enum(UNITS), "Attempts, or ns spent retrying."),
        Column(
            "settled",
            pl.Enum(names(Counted)),
            "How requests that another thread completed are counted: as last seen busy (busy), or "
            "as done at their last attempt (done); none: there are no such requests.",
        ),
        Column("step", I64, "Attempts, or place in the fixed list of times of attempts."),
        Column("n_done", I64, "Retried requests that were done at this step."),
        Column("n_censored", I64, "Requests last observed busy at this step."),
        Column(
            "n_more", I64, "Requests that needed more than this step, but not more than the next."
        ),
        Column("squares", I64, "Contribution of these to the sum of squared sizes of bursts."),
        Column("n_episodes", I64, "Bursts whose longest request is among these."),
        *(
            Column(
                f"{unit}_{what}", I64, f"Contribution of these to the sum of {text} of each {unit}."
            )
            for unit in CLUSTERED_BY
            for what, text in (
                ("squares", "the squares"),
                ("products", "the products with all requests"),
            )
        ),
        Column("trend", F64, "Sum over these of the period, from the middle of the input."),
        Column("trend_squares", F64, "Sum over these of the squares of these periods."),
    ),
)

ATTEMPT_TOTALS = Table(
    name="attempt_totals",
    grain="one row per leaf, and per TD of a leaf: its requests, and the sizes of their clusters",
    meaning="Totals over all steps of the curves in attempt_counts; totals of several inputs add.",
    key=("leaf", "source", "td_id"),
    columns=(
        LEAF,
        Column("source", U16, "Input of the TD; null: the whole leaf.", nullable=True),
        Column("td_id", U64, "The TD; null: the whole leaf.", nullable=True),
        Column("n_requests", U64, "Retry chains."),
        Column("n_done", I64, "Requests with an answer other than busy and a recorded beginning."),
        Column("n_all", I64, "Requests that are in curves."),
        *(
            column
            for unit in CLUSTERED_BY
            for column in (
                Column(f"{unit}_clusters", I64, f"Clusters ({unit}s) with a request."),
                Column(f"{unit}_known", I64, "Clusters that are identified."),
                Column(f"{unit}_sizes", I64, "Sum of the squared numbers of their requests."),
            )
        ),
        Column("trend_mean", F64, "Sum over requests of the period, from the middle."),
        Column("trend_square", F64, "Sum over periods of the squared period, from the middle."),
    ),
)

FACT_LEAVES = Table(
    name="fact_leaves",
    grain="one row per leaf of a trace: its requests, clusters of them, and the recorded policy",
    meaning="Inputs of limits besides curves; the policy is that of the recorded kernel, as far as "
    "its requests show it.",
    key=("leaf",),
    columns=(
        *(c for c in ATTEMPT_TOTALS.columns if c.name not in ("source", "td_id")),
        Column("n_tds", U64, "TDs observed to use the leaf."),
        Column("n_retried", U64, "Requests answered busy at least once."),
        Column("n_begin_lost", U64, "Requests whose beginning may be lost."),
        Column("calls", U32, "Calls at which requests were given up, or kicked.", nullable=True),
        Column("n_given_up", U32, "Requests given up at that number."),
        Column("may_kick", BOOL, "Whether vCPUs may have been kicked before the second call."),
        Column("is_kicked", BOOL, "Whether the trace shows that they were kicked."),
    ),
)

DURATIONS: Final = ("pace", "request", "busy")
# Cells of a histogram per doubling: a value is resolved to 1/64 of an octave, 1.1 %.
CELLS_PER_OCTAVE: Final = 64

FACT_CELLS = Table(
    name="fact_cells",
    grain="one row per leaf, kind of duration and cell of its histogram",
    meaning="Durations in cells of 1.1 % width, which are the same in all inputs, so that counts "
    "add; cell n holds times from 2^(n/64) to below 2^((n+1)/64) ns, cell 0 also those below 1 ns.",
    key=("duration", "leaf", "cell"),
    columns=(
        Column(
            "duration",
            pl.Enum(DURATIONS),
            "pace: from one attempt of a retried request to the next; request: the whole request; "
            "busy: one busy answer.",
        ),
        LEAF,
        Column("cell", U16, "Number of the cell."),
        Column("n", U64, "Durations in it."),
    ),
)

RARE: Final = ("zero_step", "broken_rule", "verdict", "loss")

FACT_RARE = Table(
    name="fact_rare",
    grain="one row per kind, name and leaf of rare findings in a trace: how many were found",
    meaning="Numbers of zero-step episodes, broken rules, verdicts and losses of a trace.",
    key=("what", "name", "detail", "leaf"),
    columns=(
        Column("what", pl.Enum(RARE), "Kind of finding."),
        Column("name", TEXT, "Form of the episode, rule, verdict, or kind of loss."),
        Column("detail", TEXT, "End of the episode, confidence, cause or severity."),
        Column("leaf", LEAF.dtype, "SEAMCALL leaf, if any.", nullable=True),
        Column("n", U64, "Number of findings."),
    ),
)

FACT_PARTS = Table(
    name="fact_parts",
    grain="one row per part of a fleet's facts: a trace that was read whole",
    meaning="A part holds the counts of one trace; it is complete if its provenance is written.",
    key=("part",),
    columns=(
        Column("part", TEXT, "Hash of the trace's content (BLAKE2b, 16 bytes)."),
        Column("origin", TEXT, "Hash of the trace's path, size and modification time."),
        Column("host", TEXT, "The host, or a keyed hash of its name."),
        Column("date", TEXT, "Day of the recording, or unknown."),
        Column("kernel", TEXT, "Version of the kernel, or unknown."),
        Column("module", TEXT, "Release of the TDX module, or unknown."),
        Column("generation", TEXT, "Lock generation of the module: A, B, C, or unknown."),
        Column("format", TEXT, "Format of the trace."),
        Column("n_bytes", U64, "Size of the trace."),
        Column("observed_ns", I64, "Recorded time; null: no unit.", "ns", nullable=True),
        Column("vm_ns", I64, "Time from the first to the last request of each TD.", "ns"),
        Column("n_pages", U64, "Pages of 4 KB added to running TDs."),
        Column("n_losses", U64, "Losses of data."),
        Column("tdxtrace", TEXT, "Version of tdxtrace that read it."),
    ),
)

FACT_FAILURES = Table(
    name="fact_failures",
    grain="one row per trace that could not be counted",
    meaning="A failure is a trace that cannot be read, or whose reading ended its worker.",
    key=("origin",),
    columns=(
        Column("origin", TEXT, "Hash of the trace's path, size and modification time."),
        Column("trace", TEXT, "Its path as given: untrusted text."),
        Column("reason", TEXT, "Reason in one line: untrusted text."),
        Column("n_tries", U32, "Number of tries."),
    ),
)

FLEET_LIMITS = Table(
    name="fleet_limits",
    grain="one row per group of hosts, leaf, maker of busy answers and unit: limits of a fleet",
    meaning="The limit computed from all traces as one recording, the limit with hosts as "
    "clusters, and the larger of the two.",
    key=("group", "leaf", "made_by", "unit"),
    columns=(
        Column("group", TEXT, "Host, kernel or module; all: hosts are not grouped."),
        LEAF,
        Column("made_by", TEXT, "Whose busy answers count: anyone's, the host's or the guest's."),
        Column("unit", pl.Enum(UNITS), "Attempts, or ns of retrying."),
        Column("target", F64, "Maximum probability that a request needs more."),
        Column("confidence", F64, "One-sided confidence."),
        Column("limit", I64, "The larger limit; null: one of the two is withheld.", nullable=True),
        Column("basis", TEXT, "Basis, as in limits."),
        Column("as_one_limit", I64, "The limit of all traces as one recording.", nullable=True),
        Column("hosts_limit", I64, "The limit with hosts as clusters.", nullable=True),
        Column("without_low", I64, "Smallest hosts_limit with one host left out.", nullable=True),
        Column("without_high", I64, "Largest hosts_limit with one host left out.", nullable=True),
        Column("n_without", U64, "Hosts that were left out, one at a time."),
        Column("n_without_withheld", U64, "Of these, hosts without which the limit is withheld."),
        Column("n_hosts", U64, "Hosts with requests of the leaf."),
        Column("n_requests", U64, "Requests of the leaf on these hosts."),
        Column("n_retried", U64, "Requests answered busy."),
        Column("max_seen", I64, "Maximum that a request was observed to need."),
        Column("tail_from", I64, "Step after which the tail begins.", nullable=True),
        Column("tail_host", TEXT, "Host with most requests of the tail.", nullable=True),
        Column("tail_ratio", F64, "Share of that host in the tail.", nullable=True),
        Column("reason", TEXT, "Why the limit is withheld, or a warning.", nullable=True),
    ),
)

FLEET_HOSTS = Table(
    name="fleet_hosts",
    grain="one row per leaf, unit and host: its part of the fleet's tail",
    meaning="The tail begins after the largest step that at least thirty requests exceeded, or "
    "after the first step if fewer than thirty exceeded it.",
    key=("leaf", "unit", "host"),
    columns=(
        LEAF,
        Column("unit", pl.Enum(UNITS), "Attempts, or ns of retrying."),
        Column("host", TEXT, "The host."),
        Column("tail_from", I64, "Step after which the tail begins."),
        Column("n_requests", U64, "Requests of the leaf that are in curves."),
        Column("n_tail", U64, "Of these, requests in the tail."),
        Column("tail_ratio", F64, "Share of the fleet's tail."),
        Column("p", F64, "Probability of at least this many bursts if all hosts were alike."),
        Column("is_outlier", BOOL, "Whether p, times the number of hosts, is below 0.01."),
    ),
)

PART_TABLES: Final = (ATTEMPT_COUNTS, ATTEMPT_TOTALS, FACT_LEAVES, FACT_CELLS, FACT_RARE)
FLEET_TABLES: Final = (*PART_TABLES, FACT_PARTS, FACT_FAILURES, FLEET_LIMITS, FLEET_HOSTS)
