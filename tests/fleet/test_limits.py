"""Limits of a fleet: hosts as clusters, outlier hosts, rollouts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats
from support.fleet import facts_at
from support.made_chains import chains_of

from tdxtrace.analysis.attempts import count_attempts, curves_of
from tdxtrace.errors import QueryError
from tdxtrace.fleet.facts import FILES, FORMAT, PROVENANCE, Part
from tdxtrace.fleet.limits import compare_fleets, fleet_hosts, fleet_limits
from tdxtrace.fleet.mapping import part_folder
from tdxtrace.fleet.merge import Facts, count_fleet
from tdxtrace.recommend.limits import leaves_of
from tdxtrace.recommend.recorded import recorded_policies
from tdxtrace.recommend.target import Target
from tdxtrace.tables.causes import BUSY_CAUSES
from tdxtrace.tables.fleet import FACT_LEAVES, FLEET_HOSTS, FLEET_LIMITS
from tdxtrace.tables.limits import BUSY_ANSWERS


def write_part(place: Path, host: str, n_busy: list[int], part: str = "0", **named: str) -> None:
    """Write the facts of a host whose requests were busy so often, each alone."""
    chains = chains_of(n_busy).with_columns(begin_lost=pl.lit(False), took_ns=pl.lit(0, pl.Int64))
    answers = [
        {"source": 0, "seq": seq, "first_seq": seq, "leaf": 6, "number": n, "waited_ns": 1000 * n}
        | {"status": 0x8000020000000092, "episode": seq}
        for seq, busy in enumerate(n_busy, 1)
        for n in range(1, busy + 1)
    ]
    rows = pl.DataFrame(answers, schema=BUSY_ANSWERS.schema)
    counts = count_attempts(chains, rows, BUSY_CAUSES.empty())
    leaves = (
        counts.totals.join(leaves_of(chains).drop("n_requests"), on="leaf")
        .join(recorded_policies(chains).drop("source", "n_retried"), on="leaf")
        .cast({"n_tds": pl.UInt64, "n_retried": pl.UInt64, "n_begin_lost": pl.UInt64})
        .cast({"n_given_up": pl.UInt32})
    )
    tables = {name: table.empty() for name, table in FILES.items()}
    tables |= {"counts": counts.steps, "leaves": FACT_LEAVES.conform(leaves)}
    identity = {"date": "unknown", "kernel": "7.2", "module": "unknown", "host": host} | named
    provenance: dict[str, Any] = identity | {
        "part": f"{host}-{part}",
        "origin": f"{host}-{part}",
        "format": "made",
    }
    provenance |= {"generation": "unknown", "n_bytes": 1, "observed_ns": 10**9, "vm_ns": 0}
    provenance |= {"n_pages": 0, "n_losses": 0, "tdxtrace": "test"}
    folder = place / part_folder(identity, f"{host}-{part}")
    folder.mkdir(parents=True)
    for name, content in Part(provenance, tables).files().items():
        (folder / name).write_bytes(content)
    assert (folder / PROVENANCE).read_text().startswith(f'{{\n "date": "{identity["date"]}"')
    assert str(folder.relative_to(place)).startswith(f"format={FORMAT}/")


def requests(n: int, share: float, deep: float = 0.5, seed: int = 1) -> list[int]:
    """Busy answers of n requests: a share is busy, each further time with the chance ``deep``."""
    chance = np.random.default_rng(seed)
    busy = chance.random(n) < share
    return [int(chance.geometric(1 - deep)) if one else 0 for one in busy]


def fleet(place: Path, shares: list[float], n: int = 400) -> Facts:
    for number, share in enumerate(shares):
        write_part(place, f"host{number:02}", requests(n, share, seed=number))
    return facts_at(place)


def row_of(limits: pl.DataFrame, unit: str = "attempts") -> dict[str, object]:
    FLEET_LIMITS.check(limits)
    return limits.filter(made_by="anyone", unit=unit).row(0, named=True)


def test_hosts_that_are_alike_give_nearly_the_limit_of_one_recording(tmp_path: Path) -> None:
    row = row_of(fleet_limits(fleet(tmp_path, [0.2] * 20), Target(0.02)))
    assert row["n_hosts"] == 20
    assert row["n_requests"] == 8000
    assert isinstance(row["hosts_limit"], int)
    assert isinstance(row["as_one_limit"], int)
    assert abs(row["hosts_limit"] - row["as_one_limit"]) <= 1
    assert row["limit"] == max(row["hosts_limit"], row["as_one_limit"])
    assert row["n_without"] == 20
    assert row["without_low"] is not None


def test_intervals_are_wider_if_hosts_differ(tmp_path: Path) -> None:
    counts = count_fleet(fleet(tmp_path, [0.02, 0.4] * 5))
    first = pl.col("by") == "leaf", pl.col("unit") == "attempts", pl.col("within") == 1
    (row,) = curves_of(counts.of_hosts()).filter(*first).to_dicts()
    assert row["unit_of_dependence"] == "host"
    # Half of ten hosts have 2 %, half 40 %: the standard error of the mean is 6.3 points.
    assert row["done_ratio"] == pytest.approx(0.79, abs=0.02)
    # Student's quantile of nine degrees of freedom, and the upper bound of the variance: its third.
    width = 2 * 2.26 * 0.063 * math.sqrt(9 / stats.chi2.ppf(1 / 3, 9))
    assert row["done_high"] - row["done_low"] == pytest.approx(width, rel=0.2)


def test_one_outlier_host_has_most_of_the_tail(tmp_path: Path) -> None:
    place = tmp_path / "facts"
    for number in range(9):
        write_part(place, f"host{number}", requests(500, 0.1, seed=number))
    write_part(place, "odd", requests(500, 0.5, deep=0.9, seed=99))
    facts = facts_at(place)
    hosts = FLEET_HOSTS.check(fleet_hosts(count_fleet(facts)))
    first = hosts.filter(pl.col("unit") == "attempts").row(0, named=True)
    assert (first["host"], first["is_outlier"]) == ("odd", True)
    assert hosts.filter(pl.col("is_outlier"))["host"].unique().to_list() == ["odd"]
    row = row_of(fleet_limits(facts, Target(0.05)))
    assert row["tail_host"] == "odd"
    # Without it the limit is small; with it, it is withheld, or much larger.
    assert isinstance(row["without_low"], int)
    assert row["without_low"] < 10
    assert row["hosts_limit"] is None or int(str(row["hosts_limit"])) > row["without_low"]


def test_days_of_one_host_are_one_cluster(tmp_path: Path) -> None:
    for day in range(6):
        for host in ("a", "b"):
            write_part(tmp_path, host, requests(300, 0.2, seed=day), part=str(day))
    row = row_of(fleet_limits(facts_at(tmp_path), Target(0.05)))
    assert row["n_hosts"] == 2


def test_limits_of_one_host_are_not_given_for_others(tmp_path: Path) -> None:
    row = row_of(fleet_limits(fleet(tmp_path, [0.1]), Target(0.05)))
    assert str(row["reason"]).startswith("of one host: nothing is known of others")
    assert row["n_without"] == 0


def test_groups_have_limits_of_their_own(tmp_path: Path) -> None:
    for number in range(4):
        kernel = "7.1" if number < 2 else "7.2"
        numbers = requests(300, 0.1 * number, seed=number)
        write_part(tmp_path, f"h{number}", numbers, kernel=kernel)
    rows = fleet_limits(facts_at(tmp_path), Target(0.1), by="kernel")
    sizes = rows.filter(made_by="anyone", unit="ns").select("group", "n_hosts").rows()
    assert sizes == [("7.1", 2), ("7.2", 2)]
    with pytest.raises(QueryError, match="--by is one of host, kernel, module"):
        fleet_limits(facts_at(tmp_path), by="date")


def test_a_rollout_is_compared_with_hosts_as_clusters(tmp_path: Path) -> None:
    for number in range(8):
        before = requests(400, 0.05, seed=number)
        after = requests(400, 0.3, seed=100 + number)
        write_part(tmp_path, f"h{number}", before, kernel="7.1")
        write_part(tmp_path, f"h{number}", after, part="1", kernel="7.2")
    facts = facts_at(tmp_path)
    old, new = (facts.where(f"kernel = '{kernel}'") for kernel in ("7.1", "7.2"))
    first = compare_fleets(old, new).filter(unit="attempts", within=1).row(0, named=True)
    assert first["change"] == "more"
    assert first["difference"] == pytest.approx(0.25, abs=0.03)
    assert compare_fleets(old.where("host < 'h4'"), old.where("host >= 'h4'"))[
        "change"
    ].unique().to_list() == ["not_told"]
    with pytest.raises(QueryError, match="16 traces in common"):
        compare_fleets(facts, facts)
