"""SEAMCALL tracepoints that are not in mainline: proposed ones and those of other trees."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, Literal

from tdxtrace.ingest.events.fields import Fields
from tdxtrace.tdx.leaves import parse_leaf

# kvm:kvm_tdx_seamcall_enter / _exit: RFC v2 08/69 of the KVM TDX series, 2021-07-02.
# kvm:kvm_sept_seamcall: the same series.  tdx_seam:tdx_seamcall / tdx_seamret:
# Intel's tree, arch/x86/kvm/vmx/tdx_trace.h; its registers are bare hex.
_OP = re.compile(r"\bop: (?P<name>[\w.]+)(?:\((?P<number>[0-9a-f]+)\))?")
_REGISTER = re.compile(r"\b(?P<name>rcx|rdx|r8): (?P<n>0x[0-9a-f]+)")
_ERROR = re.compile(r"\berr (?:\S*) (?P<n>0x[0-9a-f]{1,16})\b")
_BARE_ERROR = re.compile(r"\berr: \S*?\((?P<n>[0-9a-f]{1,16})\)")
_BARE = re.compile(r"(?<=\) )(?P<rcx>[0-9a-f]+) (?P<rdx>[0-9a-f]+) (?P<r8>[0-9a-f]+)\b")
_SEPT = re.compile(r"\bgpa: (?P<gpa>0x[0-9a-f]+) hpa: (?P<page>0x[0-9a-f]+) level: (?P<level>\d+)")


def _leaf(fields: Fields, args: str) -> None:
    found = _OP.search(args)
    if found is None:
        return
    try:
        number = found["number"]
        leaf, version = parse_leaf(f"0x{number}" if number else found["name"])
    except ValueError:
        return
    fields.values |= {"leaf": leaf, "version": version}


def _enter(args: str) -> Fields:
    fields = Fields()
    _leaf(fields, args)
    for found in _REGISTER.finditer(args):
        fields.put(found["name"], found, "n")
    bare = _BARE.search(args)
    if bare is not None:
        for name in ("rcx", "rdx", "r8"):
            fields.put(name, bare, name, 16)
    return fields


def _exit(args: str) -> Fields:
    fields = Fields()
    _leaf(fields, args)
    error = _ERROR.search(args) or _BARE_ERROR.search(args)
    if error is not None:
        fields.put("status", error, "n", 16)
    for found in _REGISTER.finditer(args):
        if found["name"] != "r8":
            fields.put(f"out_{found['name']}", found, "n")
    bare = _BARE.search(args, error.end() - 1) if error else None
    if bare is not None:
        fields.put("out_rcx", bare, "rcx", 16)
        fields.put("out_rdx", bare, "rdx", 16)
    return fields


def _sept(args: str) -> Fields:
    fields = Fields()
    _leaf(fields, args)
    found = _SEPT.search(args)
    if found is not None:
        for name in ("gpa", "page", "level"):
            fields.put(name, found, name)
    return fields


Decoder = Callable[[str], Fields]
DECODERS: Final[Mapping[str, tuple[Literal["entry", "return"], Decoder]]] = {
    "kvm_tdx_seamcall_enter": ("entry", _enter),
    "kvm_tdx_seamcall_exit": ("return", _exit),
    "tdx_seamcall": ("entry", _enter),
    "tdx_seamcall_enter": ("entry", _enter),
    "tdx_seamcall_exit": ("return", _exit),
    "tdx_seamret": ("return", _exit),
    "kvm_sept_seamcall": ("entry", _sept),
}
