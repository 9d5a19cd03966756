"""The data files: each fact has a public source, and they are read as written."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tdxtrace.tdx.facts
from tdxtrace.tdx.facts import facts
from tdxtrace.tdx.word import hexadecimal

FILES = sorted((Path(tdxtrace.tdx.facts.__file__).parent / "data").iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_fact_names_a_public_source(path: Path) -> None:
    source = facts(path.stem)["source"]
    intel = "intel/tdx-module|intel/confidential-computing|Intel TDX ABI"
    public = source.str.contains(
        rf"^(inferred|{intel}|Linux|huge page|intel/lkvs|out-of-tree|qizhangz/seam-loader)"
    )
    assert public.all()
    assert not source.str.contains("/work|/tmp|shared/|domain/").any()


def test_the_files_are_all_tables() -> None:
    assert [path.name for path in FILES] == [
        "accept_baselines.csv",
        *(
            "bug_rules.csv",
            "builds.csv",
            "exit_reasons.csv",
            "generations.csv",
            "kernels.csv",
            "kvm.csv",
        ),
        *("leaves.csv", "loader_leaves.csv", "loader_status_codes.csv", "locks.csv"),
        "module_weaknesses.csv",
        *("operand_ids.csv", "operands.csv", "resources.csv", "status_by_leaf.csv"),
        *("status_codes.csv", "tdvmcalls.csv", "wrappers.csv"),
    ]


def test_numbers_are_read_in_hexadecimal_and_decimal() -> None:
    table = facts("resources", leaf=pl.UInt16, operand_id=pl.UInt32)
    first = table.filter(pl.col("call") == "TDH.PHYMEM.CACHE.WB")
    assert first.select("leaf", "operand_id").rows() == [(40, 0xBA), (40, 0xBC)]


def test_the_folder_of_the_files_is_no_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("venv1", "1"), ("venv[1]", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "some.csv").write_text(f"n\n{value}\n")
    monkeypatch.setattr(tdxtrace.tdx.facts, "_DATA", tmp_path / "venv[1]")
    assert facts("some", n=pl.UInt8)["n"].to_list() == [2]


def test_an_empty_field_is_null() -> None:
    table = facts("locks", operand_id=pl.UInt32)
    assert table.filter(pl.col("lock") == "SYS")["operand_id"].null_count() > 0


@given(st.integers(0, 2**64 - 1))
def test_hexadecimal_is_what_the_kernel_prints(number: int) -> None:
    frame = pl.Series("n", [number, None], dtype=pl.UInt64).to_frame()
    assert frame.select(hexadecimal(pl.col("n"))).to_series().to_list() == [hex(number), None]


def test_hexadecimal_takes_narrower_numbers() -> None:
    frame = pl.Series("n", [0, 0xFFFF], dtype=pl.UInt16).to_frame()
    assert frame.select(hexadecimal(pl.col("n"))).to_series().to_list() == ["0x0", "0xffff"]
