"""Checks of the host: kernel, privilege, lockdown, CPU, KVM, TDX module, tools."""

from __future__ import annotations

import os
import re
import shutil
from typing import Final

from tdxtrace.capture.host import Check, Host
from tdxtrace.tdx import releases, wrappers

# include/uapi/linux/capability.h.
_CAP_SYS_ADMIN: Final = 21
_CAPS: Final = re.compile(r"^CapEff:\s*(?P<mask>[0-9a-f]{1,16})$", re.MULTILINE)
_CHOSEN: Final = re.compile(r"\[(?P<word>\w+)\]")
_NAMES_RELEASE: Final = releases.VERSION_LINE.pattern
_MODULE: Final = re.compile(r"tdx: (?:TDX[- ])?" + _NAMES_RELEASE)
# "module initialized", "module initialization failed (-5)" up to 7.1; from 7.2 on "TDX-Module ..."
# (Linux Documentation/arch/x86/tdx.rst, which describes both); "TDX module ..." out of tree.
_INITIALISED: Final = re.compile(
    r"tdx: (?:TDX[- ])?[Mm]odule initializ(?:ed|ation failed(?: \((?P<error>-\d{1,9})\))?)"
)
# Kernels of Intel and Ubuntu up to 6.8: numbers as text, hexadecimal ("0x000002ba") or decimal.
_FIRMWARE: Final = "sys/firmware/tdx/tdx_module"
_FIRMWARE_NUMBER: Final = re.compile(r"(?:0x)?[0-9a-f]{1,8}", re.IGNORECASE)
_TOOLS: Final = ("trace-cmd", "perf", "bpftrace")
_MAX_MESSAGES: Final = 100_000


def kernel(host: Host) -> Check:
    """Check the release, and whether the signatures of its wrappers are known."""
    release = host.release
    if not release:
        return Check("kernel", "unknown", "no release in /proc", "the level base", "mount /proc")
    base = wrappers.level_base(release)
    if base is None:
        return Check(
            "kernel",
            "limited",
            f"Linux {release}, whose wrappers were not read",
            "names of arguments: SEAMCALLs are probed below the wrappers",
            "none needed from 6.16 on; before it KVM has no TDX",
        )
    return Check("kernel", "ok", f"Linux {release}; a 4K page has level {base}")


def privilege(host: Host) -> Check:
    """Check for CAP_SYS_ADMIN, in practice root."""
    found = _CAPS.search(host.read("proc/self/status").text or "")
    if found is None:
        return Check("root", "unknown", "no capabilities in /proc", "everything", "mount /proc")
    if int(found["mask"], 16) >> _CAP_SYS_ADMIN & 1:
        return Check("root", "ok", "CAP_SYS_ADMIN")
    return Check(
        "root", "missing", f"user {os.geteuid()} without CAP_SYS_ADMIN", "everything", "use sudo"
    )


def lockdown(host: Host) -> Check:
    """Check lockdown: confidentiality forbids kprobes and tracefs, integrity allows them.

    Source: Linux include/linux/security.h, enum lockdown_reason: LOCKDOWN_KPROBES,
    LOCKDOWN_BPF_READ_KERNEL, LOCKDOWN_PERF and LOCKDOWN_TRACEFS are above
    LOCKDOWN_INTEGRITY_MAX.
    """
    seen = host.read("sys/kernel/security/lockdown")
    if seen.text is None:
        return Check(
            "lockdown",
            "unknown",
            f"/sys/kernel/security/lockdown is {seen.why}",
            remedy="mount -t securityfs none /sys/kernel/security",
        )
    word = _CHOSEN.search(seen.text)
    mode = word["word"] if word else "none"
    if mode == "confidentiality":
        return Check(
            "lockdown",
            "missing",
            "confidentiality",
            "kprobes, BPF, perf and tracefs",
            "boot with lockdown=integrity, or without Secure Boot",
        )
    if mode == "integrity":
        return Check(
            "lockdown",
            "ok",
            "integrity: tracefs and probes are allowed; some vendors' kernels refuse global "
            "files, which trace-cmd writes and tdxtrace does not",
        )
    return Check("lockdown", "ok", mode)


def cpu(host: Host) -> Check:
    """Check that CPU and BIOS offer TDX: flag tdx_host_platform, Linux 6.7 or later."""
    seen = host.read("proc/cpuinfo")
    if seen.text is None:
        return Check("cpu", "unknown", f"/proc/cpuinfo is {seen.why}")
    if re.search(r"^flags\s*:.*\btdx_host_platform\b", seen.text, re.MULTILINE):
        return Check("cpu", "ok", "tdx_host_platform")
    return Check(
        "cpu",
        "missing",
        "no tdx_host_platform among the processor's flags",
        "this machine can run no TD",
        "a Xeon of the 4th generation or later, TDX enabled in its BIOS, Linux 6.7 or later",
    )


def kvm_intel(host: Host) -> Check:
    """Check that KVM can run TDs: parameter tdx of kvm_intel, Linux 6.16 or later."""
    if not host.exists("sys/module/kvm_intel"):
        return Check(
            "kvm_intel", "missing", "not loaded", "TDs and their probes", "modprobe kvm_intel tdx=1"
        )
    seen = host.read("sys/module/kvm_intel/parameters/tdx")
    if seen.line in ("Y", "1"):
        return Check("kvm_intel", "ok", "loaded with tdx=Y")
    state = "missing" if seen.why == "missing" or seen.text is not None else "unknown"
    value = f"tdx={seen.line}" if seen.text is not None else f"parameter tdx is {seen.why}"
    return Check("kvm_intel", state, f"loaded; {value}", "TDs", "modprobe kvm_intel tdx=1")


def tdx_module(host: Host) -> Check:
    """Check the TDX module: its release and lock generation, and whether it was initialised.

    Reads sysfs first, then the kernel's log, of which the last message counts, as the module may
    have been updated.  If the messages were overwritten since boot, the state is unknown, not
    missing.

    Source: Linux 7.2 Documentation/ABI/testing/sysfs-devices-faux-tdx-host; Linux of Intel up to
    6.8 Documentation/ABI/testing/sysfs-firmware-tdx.
    """
    release = _release_in_sysfs(host)
    if release:
        return _generation_check(release, "sysfs")
    text = _log(host)
    if text is None:
        return Check(
            "tdx_module",
            "unknown",
            "neither sysfs nor the kernel's log names it",
            "which lock rules the module follows",
            "look for 'virt/tdx' in dmesg as root",
        )
    release = _release_in_log(text)
    ended = _last(_INITIALISED, text)
    if ended and "failed" in ended[0]:
        named = f"{release}: " if release else ""
        error = f" ({ended['error']})" if ended["error"] else ""
        found = f"{named}initialisation failed{error}"
        return Check("tdx_module", "missing", found, "TDs", "see dmesg")
    if release:
        return _generation_check(release, "kernel log")
    if ended:
        return Check(
            "tdx_module",
            "limited",
            "initialised; version not named",
            "which lock rules the module follows",
            "note the version of the module file that the BIOS or bootloader loads",
        )
    return Check(
        "tdx_module",
        "missing" if not re.search(r"\btdx: ", text) else "unknown",
        "no message about it in the kernel's log",
        "TDs",
        "enable TDX in the BIOS; boot with kvm_intel.tdx=1",
    )


def _generation_check(release: str, where: str) -> Check:
    """Return the check of the lock generation of a release; ``where``: source of the release."""
    generation = releases.generation_of(release)
    if generation is None:
        perhaps = " or ".join(releases.generations_of_series(release)) or "not known"
        return Check(
            "tdx_module",
            "limited",
            f"{release}, lock generation {perhaps} ({where})",
            "which lock rules it follows: the release or build is not listed",
            "use --generation A, B or C with commands that report holders of locks",
        )
    return Check("tdx_module", "ok", f"{release}, lock generation {generation} ({where})")


def _release_in_sysfs(host: Host) -> str | None:
    """Return the release from sysfs; None if sysfs does not have it."""
    version = host.read("sys/devices/faux/tdx_host/version").line
    if version:
        return version[:40]
    named = {
        name: host.read(f"{_FIRMWARE}/{name}").line or ""
        for name in ("major_version", "minor_version", "build_num", "build_date")
    }
    date = _date(named.pop("build_date"))
    if not all(_FIRMWARE_NUMBER.fullmatch(text) for text in named.values()):
        return None
    major, minor, build = (
        int(text, 16 if text.lower().startswith("0x") else 10) for text in named.values()
    )
    return releases.named_by_build(major, minor, date, build)


def _date(text: str) -> str | None:
    """Return a build date as eight decimal digits: 0x0134d817 is 20240407.

    Some kernels print it in hexadecimal (Ubuntu 24.10); None if it is not a date.
    """
    digits = text.lower().removeprefix("0x")
    for date in (digits, str(int(digits, 16)) if _FIRMWARE_NUMBER.fullmatch(digits) else ""):
        if re.fullmatch(r"20\d{6}", date):
            return date
    return None


def _release_in_log(text: str) -> str | None:
    """Return the release from the last message of the kernel log that names it."""
    found = [match for match in (_last(_MODULE, text), _last(releases.BUILD_LINE, text)) if match]
    if not found:
        return None
    last = max(found, key=lambda match: match.start())
    groups = last.groupdict()
    return groups.get("version") or releases.named_by_build(**groups)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """Return the last match of a pattern."""
    found = None
    for found in pattern.finditer(text):  # noqa: B007 - the loop finds the last match
        pass
    return found


def tools(host: Host) -> Check:
    """List other tracers on the PATH; none is needed."""
    found = [name for name in _TOOLS if shutil.which(name)]
    return Check("tools", "note", ", ".join(found) if found else "none; none is needed")


def _log(host: Host) -> str | None:
    """Return the kernel log from /dev/kmsg (or a copy of it); None if not readable."""
    path = host.root / "dev/kmsg"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    parts = []
    try:
        for _ in range(_MAX_MESSAGES):
            try:
                part = os.read(fd, 8192)
            except BrokenPipeError:  # overwritten meanwhile: continue with the next record
                continue
            if not part:
                break
            parts.append(part)
    except OSError:  # EAGAIN: no more
        pass
    finally:
        os.close(fd)
    return b"".join(parts).decode("utf-8", "replace")
