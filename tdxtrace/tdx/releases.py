"""Releases of the TDX module: their lock generations, their builds, and how kernels name them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Final

from tdxtrace.tdx.facts import records

# "virt/tdx: Module version: 1.5.34" (Linux 7.2), "TDX-Module version: 1.5.24" (its series),
# "module version: 1.5.00.00.0481 (build_date 20230323)" (series of 2024), "TDX module 1.5.06.00,
# build number 744, build date 0134d817" (Ubuntu 24.10, canonical/tdx).
VERSION_LINE: Final = re.compile(
    r"\b[Mm]odule(?: ver\w{0,6}:?)? (?P<version>\d{1,3}\.\d{1,3}\.\d{1,3}(?:\.\d{1,5}){0,2})\b"
)
"""Text after "tdx: " in the kernel message that names the release."""
# Kernels of Intel and Ubuntu up to 6.8 print "TDX module: attributes 0x0, vendor_id 0x8086,
# major_version 1, minor_version 5, build_date 20240129, build_num 698": only the build identifies
# the release 1.5.05.
BUILD_LINE: Final = re.compile(
    r"TDX module: .{0,80}?\bmajor_version (?P<major>\d{1,3}), minor_version (?P<minor>\d{1,3})"
    r"(?:, build_date (?P<date>\d{8}))?(?:, build_num (?P<build>\d{1,9}))?"
)
"""Kernel message that names the build; its groups are arguments of :func:`named_by_build`."""


def generation_of(version: str) -> str | None:
    """Return the lock generation of a TDX module release.

    A: 1.0, the SEPT tree lock is exclusive for every change.  B: 1.5.01 to 1.5.16, shared for most,
    and an armed TDH.VP.ENTER takes it exclusively.  C: from 1.5.20, with host priority, and the
    armed entry takes it shared.

    Args:
        version: Module release, such as "1.5.16" or "1.5.05.46.698".

    Returns:
        "A", "B" or "C"; None for a release whose source was not read, such as later ones.

    Example:
        >>> generation_of("1.5.16"), generation_of("1.5.20"), generation_of("1.5.99")
        ('B', 'C', None)
    """
    found = re.search(r"(?<!\d)(\d++\.\d++)(?:\.(\d+))?", version)
    if found is None:
        return None
    update = int(found[2]) if found[2] else None
    for row in _rows("generations"):
        first, last = row["first"], row["last"]
        if first is None or last is None:
            covers = True
        else:
            covers = update is not None and int(first) <= update <= int(last)
        if row["series"] == found[1] and covers:
            return row["generation"]
    return None


def generations_of_series(version: str) -> tuple[str, ...]:
    """Return the lock generations of the releases of a series, if the exact release is unknown.

    Args:
        version: Module release or the start of one, such as "1.5" or "1.5 build 700".

    Returns:
        Generations in the order of releases; empty for an unknown series.
    """
    found = re.search(r"(?<!\d)\d++\.\d++", version)
    series = found[0] if found else None
    return tuple(str(row["generation"]) for row in _rows("generations") if row["series"] == series)


def same_release(named: Iterable[str]) -> str | None:
    """Return the release if all names refer to the same one, as "1.5.06" and "1.5.06.00" do.

    Args:
        named: Releases as kernels name them.

    Returns:
        The longest name; None without a name, or if the names refer to different releases.
    """
    names = sorted(named, key=len)
    short = {re.match(r"(?:\d++\.){2}\d++|.*", name)[0] for name in names}  # type: ignore[index]
    return names[-1] if len(short) == 1 else None


def named_by_build(
    major: str | int, minor: str | int, date: str | None = None, build: str | int | None = None
) -> str:
    """Return the release of a module from its major and minor number and its build.

    The build must be one that Intel published, of the same series, and of the same date if both
    dates are known.  The release of an unlisted build is not guessed from adjacent builds, because
    build numbers count the builds of all series.

    Args:
        major: Major number.
        minor: Minor number.
        date: Its build_date, such as "20240129"; None: not known.
        build: Its build_num; None: not known.

    Returns:
        Such as "1.5.05"; "1.5 build 700" for an unlisted build, "1.5" without a build.

    Source:
        Releases of intel/confidential-computing.tdx.tdx-module, see the rows of builds.csv.

    Example:
        >>> named_by_build(1, 5, "20240129", 698), named_by_build(1, 5, None, 700)
        ('1.5.05', '1.5 build 700')
    """
    series = f"{int(major)}.{int(minor)}"
    if build is None:
        return series
    for row in _rows("builds"):
        version, printed = str(row["version"]), row["build_date"]
        is_series = version.startswith(series + ".")
        is_date = date is None or printed is None or date == printed
        if row["build_num"] == str(int(build)) and is_series and is_date:
            return version
    return f"{series} build {int(build)}"


@cache
def _rows(name: str) -> list[dict[str, str | None]]:
    """Return the rows of a data file."""
    return records(name)
