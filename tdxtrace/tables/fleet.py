"""The tables of facts: counts of one trace that add over traces, hosts and days."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.enums import Counted, names
from tdxtrace.tables.events import BOOL, I64, LEAF, TEXT, U16, U32, U64
from tdxtrace.tables.limits import F64, UNITS, VIEWS
from tdxtrace.tables.schema import Column, Table

# Units of dependence whose clusters hold clean requests too; a burst is of retried ones.
CLUSTERED_BY: Final = ("period", "td", "source")

_INPUT = Column("source", U16, "Input of the TD; null unless by is td.", nullable=True)
_TD = Column("td_id", U64, "The TD; null unless by is td.", nullable=True)

ATTEMPT_COUNTS = Table(
    name="attempt_counts",
    grain="one row per curve of attempts and step: what its requests add to the sums there",
    meaning="What the curves of attempts are functions of: whole numbers, which add over inputs.",
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
            "What requests that another thread settled count as: last seen busy (busy), done at "
            "their last attempt (done), or there are none (none).",
        ),
        Column("step", I64, "Attempts, or place in the fixed list of times of attempts."),
        Column("n_done", I64, "Retried requests that were done at this step."),
        Column("n_censored", I64, "Requests last observed busy at this step."),
        Column("n_more", I64, "Requests whose last step that they needed more than is this."),
        Column("squares", I64, "What these add to the sum of the squares of bursts."),
        Column("n_episodes", I64, "Bursts whose deepest request is among them."),
        Column("cubes", I64, "What these add to the sum of the cubes of bursts."),
        *(
            Column(f"{unit}_{what}", I64, f"What these add to the sum of {text} of each {unit}.")
            for unit in CLUSTERED_BY
            for what, text in (
                ("squares", "the squares"),
                ("products", "the products with all requests"),
            )
        ),
        Column("trend", F64, "Sum over them of the period, from the middle of the input."),
        Column("trend_squares", F64, "Sum over them of the squares of these periods."),
    ),
)

ATTEMPT_TOTALS = Table(
    name="attempt_totals",
    grain="one row per leaf, and per TD of a leaf: its requests, and how they are in clusters",
    meaning="Requests of all steps of the curves in attempt_counts: whole numbers, which add.",
    key=("leaf", "source", "td_id"),
    columns=(
        LEAF,
        Column("source", U16, "Input of the TD; null: the whole leaf.", nullable=True),
        Column("td_id", U64, "The TD; null: the whole leaf.", nullable=True),
        Column("n_requests", U64, "Retry chains."),
        Column("n_done", I64, "Those with an answer other than busy, begun in sight."),
        Column("n_all", I64, "Requests that curves are about."),
        *(
            column
            for unit in CLUSTERED_BY
            for column in (
                Column(f"{unit}_clusters", I64, f"Clusters ({unit}s) with a request."),
                Column(f"{unit}_known", I64, "Those of which it is known which they are."),
                Column(f"{unit}_sizes", I64, "Sum of the squares of their requests."),
            )
        ),
        Column("trend_mean", F64, "Sum over requests of the period, from the middle."),
        Column("trend_square", F64, "Sum over periods of the square of that."),
    ),
)

FACT_LEAVES = Table(
    name="fact_leaves",
    grain="one row per leaf of a trace: its requests, clusters of them, and the recorded policy",
    meaning="What limits rest on beside curves; the policy is what the kernel that was recorded "
    "did, as far as its requests show it.",
    key=("leaf",),
    columns=(
        *(c for c in ATTEMPT_TOTALS.columns if c.name not in ("source", "td_id")),
        Column("n_tds", U64, "TDs observed to use the leaf."),
        Column("n_retried", U64, "Requests answered busy at least once."),
        Column("n_begin_lost", U64, "Requests whose beginning may be lost."),
        Column("calls", U32, "Calls at which requests were given up, or kicked.", nullable=True),
        Column("n_given_up", U32, "Requests given up at that number."),
        Column("may_kick", BOOL, "Whether vCPUs may have been kicked before the second call."),
        Column("is_kicked", BOOL, "Whether that is seen."),
    ),
)

DURATIONS: Final = ("pace", "request", "busy")
# Cells of a histogram for each doubling: a value is told to 64th of an octave, 1.1 %.
CELLS_PER_OCTAVE: Final = 64

FACT_CELLS = Table(
    name="fact_cells",
    grain="one row per leaf, kind of duration and cell of its histogram",
    meaning="Durations by cells that are 1.1 % wide and the same everywhere, so that counts add; "
    "a cell n holds the times from 2^(n/64) to below 2^((n+1)/64) ns, cell 0 those below 1 ns too.",
    key=("duration", "leaf", "cell"),
    columns=(
        Column(
            "duration",
            pl.Enum(DURATIONS),
            "pace: from one attempt of a retried request to the next; request: all of it; busy: "
            "one busy answer.",
        ),
        LEAF,
        Column("cell", U16, "Number of the cell."),
        Column("n", U64, "Durations in it."),
    ),
)

RARE: Final = ("zero_step", "broken_rule", "verdict", "loss")

FACT_RARE = Table(
    name="fact_rare",
    grain="one row per kind, name and leaf of what is rare in a trace: how often it was found",
    meaning="Zero-step episodes, broken rules, verdicts and losses of a trace, counted.",
    key=("what", "name", "detail", "leaf"),
    columns=(
        Column("what", pl.Enum(RARE), "Which table it is from."),
        Column("name", TEXT, "Form of the episode, rule, verdict, or kind of loss."),
        Column("detail", TEXT, "How it ended, confidence, cause or severity."),
        Column("leaf", LEAF.dtype, "SEAMCALL leaf, if any.", nullable=True),
        Column("n", U64, "How many."),
    ),
)

FACT_PARTS = Table(
    name="fact_parts",
    grain="one row per part of a fleet's facts: a trace that was read whole",
    meaning="A part is what is kept of one trace; its provenance is the mark that it is whole.",
    key=("part",),
    columns=(
        Column("part", TEXT, "Hash of the trace's content (BLAKE2b, 16 bytes)."),
        Column("origin", TEXT, "Hash of its place, size and time of change."),
        Column("host", TEXT, "The host; a keyed hash of its name, if that was asked for."),
        Column("date", TEXT, "Day of the recording, or unknown."),
        Column("kernel", TEXT, "Version of the kernel, or unknown."),
        Column("module", TEXT, "Release of the TDX module, or unknown."),
        Column("generation", TEXT, "Generation of its locks: A, B, C, or unknown."),
        Column("format", TEXT, "Format of the trace."),
        Column("n_bytes", U64, "Its size."),
        Column("observed_ns", I64, "Recorded time; null: no unit.", "ns", nullable=True),
        Column("vm_ns", I64, "Time from the first to the last request of each TD.", "ns"),
        Column("n_pages", U64, "Pages of 4 KB added to running TDs."),
        Column("n_losses", U64, "Losses of data."),
        Column("tdxtrace", TEXT, "Version of tdxtrace that read it."),
    ),
)

FACT_FAILURES = Table(
    name="fact_failures",
    grain="one row per trace of which there are no facts",
    meaning="A failure is a trace that cannot be read, or whose reading ended its worker.",
    key=("origin",),
    columns=(
        Column("origin", TEXT, "Hash of its place, size and time of change."),
        Column("trace", TEXT, "Its place, as it was given: untrusted text."),
        Column("reason", TEXT, "Why, in one line: untrusted text."),
        Column("n_tries", U32, "Times it was tried."),
    ),
)

FLEET_LIMITS = Table(
    name="fleet_limits",
    grain="one row per group of hosts, leaf, maker of busy answers and unit: limits of a fleet",
    meaning="The limit that all traces give as one recording, the one with hosts as the unit of "
    "resampling, and the wider of both.",
    key=("group", "leaf", "made_by", "unit"),
    columns=(
        Column("group", TEXT, "Host, kernel or module; all: no group was asked for."),
        LEAF,
        Column("made_by", TEXT, "Whose busy answers count: anyone's, the host's or the guest's."),
        Column("unit", pl.Enum(UNITS), "Attempts, or ns of retrying."),
        Column("target", F64, "Maximum probability that a request needs more."),
        Column("confidence", F64, "One-sided confidence."),
        Column("limit", I64, "The wider answer; null: one of both is withheld.", nullable=True),
        Column("basis", TEXT, "What it rests on, as in limits."),
        Column("as_one_limit", I64, "The limit as of one recording.", nullable=True),
        Column("hosts_limit", I64, "The limit with hosts as clusters.", nullable=True),
        Column("without_low", I64, "Least hosts_limit without one host.", nullable=True),
        Column("without_high", I64, "Largest hosts_limit without one host.", nullable=True),
        Column("n_without", U64, "Hosts that were left out, one by one."),
        Column("n_without_withheld", U64, "Of these, those without which there is no limit."),
        Column("n_hosts", U64, "Hosts with requests of the leaf."),
        Column("n_requests", U64, "Their requests."),
        Column("n_retried", U64, "Requests answered busy."),
        Column("max_seen", I64, "Maximum that a request was observed to need."),
        Column("tail_from", I64, "Step from which on requests are the tail.", nullable=True),
        Column("tail_host", TEXT, "Host with most requests of the tail.", nullable=True),
        Column("tail_ratio", F64, "Its share of the tail.", nullable=True),
        Column("reason", TEXT, "Why it is withheld, or a warning.", nullable=True),
    ),
)

FLEET_HOSTS = Table(
    name="fleet_hosts",
    grain="one row per leaf, unit and host: its part of the fleet's tail",
    meaning="The tail is the requests that needed more than the largest step that thirty requests "
    "needed more than; than the first step, where fewer did.",
    key=("leaf", "unit", "host"),
    columns=(
        LEAF,
        Column("unit", pl.Enum(UNITS), "Attempts, or ns of retrying."),
        Column("host", TEXT, "The host."),
        Column("tail_from", I64, "Step after which the tail begins."),
        Column("n_requests", U64, "Requests of the leaf that curves are about."),
        Column("n_tail", U64, "Of these, those that needed more than that."),
        Column("tail_ratio", F64, "Share of the fleet's tail."),
        Column("p", F64, "Chance of so many bursts or more, if hosts were alike."),
        Column("is_outlier", BOOL, "Whether p, times the number of hosts, is below 0.01."),
    ),
)

PART_TABLES: Final = (ATTEMPT_COUNTS, ATTEMPT_TOTALS, FACT_LEAVES, FACT_CELLS, FACT_RARE)
FLEET_TABLES: Final = (*PART_TABLES, FACT_PARTS, FACT_FAILURES, FLEET_LIMITS, FLEET_HOSTS)
