"""Classify events by name (SEAMCALL probe, KVM tracepoint, noise); registry of known events."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Final, Literal

from tdxtrace.errors import QueryError
from tdxtrace.ingest.events import fields
from tdxtrace.ingest.events.fields import Decoder, Fields
from tdxtrace.tdx import wrappers

Kind = Literal["call", "vm_entry", "page_fault", "host_event", "noise", "unmapped"]
Role = Literal["entry", "return", "single"]


@dataclass(frozen=True, slots=True)
class Event:
    """Meaning of an event name: the table its records go to, their role in it, and their fields."""

    name: str
    """As printed, including the group."""
    kind: Kind
    role: Role = "single"
    function: str = ""
    """The probed kernel function, for SEAMCALL probes."""
    leaf: int | None = None
    """None where each record has its own leaf (``fn=``)."""
    probe: str = "wrapper"
    decode: Decoder = lambda _: Fields()
    needs: tuple[str, ...] = ()
    """Required fields; a record without one of them is ``undecoded``."""
    slots: Mapping[str, str] = field(default_factory=dict)
    """Slot (see batch.SLOTS) by argument name, for text and binary records."""


# Required fields of host events, by name.
_HOST_EVENT_NEEDS: Final = {
    "kvm_pio": ("port", "size", "count"),
    "kvm_vm_set_mem_attributes": ("gfn", "gfn_end"),
}
# Words that users add to the function in the name of a probe, for example for entry and return.
_PHASE_WORDS: Final = frozenset(
    "enter entry exit ret retval return returns in out done start end begin call called "
    "x e r p f k u probe kprobe kretprobe uprobe uretprobe fprobe hkid tdr".split()
)
# Short names used in recipes and on mailing lists, besides wrapper names without their prefix.
_SHORT: Final = {
    "aug": "tdh_mem_page_aug",
    "septadd": "tdh_mem_sept_add",
    "block": "tdh_mem_range_block",
    "blk": "tdh_mem_range_block",
    "unblock": "tdh_mem_range_unblock",
    "track": "tdh_mem_track",
    "remove": "tdh_mem_page_remove",
    "demote": "tdh_mem_page_demote",
    "promote": "tdh_mem_page_promote",
    "reclaim": "tdh_phymem_page_reclaim",
    "wbinvd": "tdh_phymem_page_wbinvd_hkid",
    "cachewb": "tdh_phymem_cache_wb",
    "vpenter": "tdh_vp_enter",
    "vpenter2": "tdh_vp_enter",
    "vp_exit": "tdh_vp_enter",
    "vpexit": "tdh_vp_enter",
    "vp_enter_exit": "tdh_vp_enter",
    "vpflush": "tdh_vp_flush",
    "sc": "__seamcall",
    "sc_ret": "__seamcall_ret",
    "seamcall": "__seamcall",
    "seamcall_ret": "__seamcall_ret",
}
_PREFIXES: Final = ("", "tdh_", "tdh_mem_", "tdh_phymem_")

# Keys of probe arguments and the slot that each fills: the wrappers' own parameter
# names (Linux arch/x86/virt/vmx/tdx/tdx.c, 6.16 to 7.2) and names in common use.
KEYS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("td", "tdr", "kvm_tdx", "td_id"), "td_id"),
    **dict.fromkeys(("vp", "tdvpr", "vp_id"), "vp_id"),
    **dict.fromkeys(("level", "lvl"), "level"),
    **dict.fromkeys(("page", "pfn", "hpa"), "page"),
    **{name: name for name in wrappers.PAGES[1:]},
    **dict.fromkeys(("ext1", "ext_err1", "err1", "e1", "entry"), "ext_err1"),
    **dict.fromkeys(("ext2", "ext_err2", "err2", "e2", "level_state"), "ext_err2"),
    **dict.fromkeys(("ret", "retval", "status", "err", "rc", "rax", "vp_enter_ret"), "status"),
    **dict.fromkeys(("fn", "op"), "fn"),
    **{name: name for name in ("gpa", "gfn", "rcx", "rdx", "r8")},
    **dict.fromkeys(("vcpu", "vcpu_id"), "vcpu_id"),
}
_PASSED_BY_VALUE: Final = ("td", "vp", "gpa", "level", "pfn", "fn", *wrappers.PAGES)
# These overwrite struct tdx_module_args with the output registers before they return
# (Linux arch/x86/virt/vmx/tdx/seamcall.S); __seamcall leaves it unchanged.
_OVERWRITES_ARGS: Final = ("__seamcall_ret", "__seamcall_saved_ret")
# Called after each return of tdx_vcpu_run (Linux arch/x86/kvm/x86.c, vcpu_enter_guest).  A probe on
# it shows the result of TDH.VP.ENTER only if it reads the status from struct vcpu_tdx.
HANDLE_EXIT: Final = "tdx_handle_exit"
_ARROW: Final = re.compile(r"^\([^)]*<-|\b__probe_ret_ip=")
_ADDRESS: Final = re.compile(r"^\([^)<]*\)|\b__probe_ip=")
_SYMBOL: Final = re.compile(r"^\((?P<a>[\w.]+)(?P<offset>\+0x[0-9a-f]+)?")
# Names of kernel functions that issue SEAMCALLs, or a bare address.
_WRAPPER: Final = re.compile(r"tdh_|_{0,3}seamcall|[0-9a-f]{8,16}$")
_FUNCTION: Final = re.compile(r"(?:^\(|<- )(?P<name>[A-Za-z_][\w.]*)(?: \[\w+\])?(?=\)| <-)")


def mapping_of(text: str) -> tuple[str, str, Role | None]:
    """Parse a user's ``EVENT=FUNCTION[:entry|:return]`` into event, function and role.

    Raises:
        QueryError: If it does not have that form or the function is unknown.
    """
    event, equals, target = text.partition("=")
    function, _, role = target.partition(":")
    if not (event and equals and function) or role not in ("", "entry", "return"):
        raise QueryError(f"not a mapping: {text!r}; write EVENT=FUNCTION, EVENT=FUNCTION:return")
    known = function_named(function)
    if known is None:
        raise QueryError(
            f"unknown function in {text!r}; name a wrapper such as tdh_mem_page_aug or a leaf"
        )
    return event, known, role or None  # type: ignore[return-value]


def classify(name: str, args: str, mappings: Mapping[str, tuple[str, Role | None]]) -> Event:
    """Classify the event ``name`` from one of its lines.

    Args:
        name: The event name as printed, with its group if it has one.
        args: The text after the name, which shows whether it is an entry or a return.
        mappings: Function and role by event name, with or without group, as given by the user.
    """
    bare = name.rpartition(":")[2]
    if bare in fields.KVM_DECODERS:
        return _kvm(name, bare)
    role = role_of(args)
    # A probe may have the same name as an out-of-tree tracepoint.
    if bare in fields.OUT_OF_TREE and role is None:
        return _out_of_tree(name, bare)
    given = mappings.get(name) or mappings.get(bare)
    if given is not None:
        return _call(name, given[0], given[1] or role or "entry", args)
    if role is None:
        return Event(name, "noise")
    function = _function_in(args, role) or function_named(bare) or _function_of_group(name)
    if function is not None:
        return _call(name, function, role, args)
    return Event(name, "unmapped" if _may_be_wrapper(args, role) else "noise")


@lru_cache(maxsize=4096)
def function_named(name: str) -> str | None:
    """Return the kernel function named within ``name``, an event or a user's text; or None."""
    words = name.lower().replace(".", "_")
    if words in _aliases():
        return _aliases()[words]
    found = [
        (len(alias), function)
        for alias, function in _aliases().items()
        if (rest := _without(words, alias)) is not None
        and all(word in _PHASE_WORDS or word.isdigit() for word in rest)
    ]
    return max(found)[1] if found else None


def _function_of_group(name: str) -> str | None:
    """Return the function in the group name, if the event name is only "entry" or the like."""
    group, _, bare = name.rpartition(":")
    is_side = all(word in _PHASE_WORDS for word in bare.lower().split("_"))
    return function_named(group) if is_side else None


def names_a_probe(name: str, mappings: Mapping[str, tuple[str, Role | None]]) -> bool:
    """Return whether an event may be a SEAMCALL probe, judging by its name alone."""
    bare = name.rpartition(":")[2]
    return name in mappings or bare in mappings or function_named(bare) is not None


def _without(words: str, alias: str) -> list[str] | None:
    """Return the words of a name other than ``alias``; None if it does not contain ``alias``."""
    before, found, after = f"_{words}_".partition(f"_{alias}_")
    return [word for word in f"{before}_{after}".split("_") if word] if found else None


@cache
def functions() -> frozenset[str]:
    """Return the kernel functions that issue SEAMCALLs: known wrappers, and names of leaves."""
    known = wrappers.wrapper_table()["function"]
    return frozenset(known) | wrappers.functions_named_as_leaves().keys()


@cache
def _aliases() -> Mapping[str, str]:
    others = wrappers.functions_named_as_leaves()
    names = dict(_SHORT) | {name: name for name in others}
    for function in functions() - others.keys():
        for prefix in _PREFIXES:
            if function.startswith(prefix):
                names.setdefault(function.removeprefix(prefix), function)
    return {alias: function for alias, function in names.items() if alias}


def role_of(args: str) -> Role | None:
    """Return whether text is from an entry or a return probe; None: not from a probe."""
    if not args.startswith("(") and "__probe_" not in args:
        return None
    if _ARROW.search(args):
        return "return"
    return "entry" if _ADDRESS.search(args) else None


def _function_in(args: str, role: Role) -> str | None:
    """Return the wrapper named in a kprobe's text, or None."""
    return next((name for name in _symbols(args, role) if name in functions()), None)


def _symbols(args: str, role: Role) -> list[str]:
    """Return the functions named in a kprobe's text; for a return, the symbols without an offset.

    Tools differ on which side of the arrow they print the function. Suffixes that compilers append
    to a name (".isra.0", ".constprop.0") are removed.
    """
    if role == "entry":
        found = _SYMBOL.match(args)
        names = [found["a"]] if found else []
    else:
        names = [found["name"] for found in _FUNCTION.finditer(args.partition(")")[0] + ")")]
    return [name.partition(".")[0] for name in names if not name[0].isdigit()]


def _may_be_wrapper(args: str, role: Role) -> bool:
    """Return whether a probe may be on a SEAMCALL function that this version does not know.

    True if its text has only addresses, or a name like that of a wrapper. A probe on any other
    named function must not be mapped: that would invent SEAMCALLs.
    """
    names = _symbols(args, role)
    return not names or any(_WRAPPER.match(name) for name in names)


def _kvm(name: str, bare: str) -> Event:
    decode = fields.KVM_DECODERS[bare]
    if bare == "kvm_entry":
        return Event(name, "vm_entry", "entry", "vm", decode=decode, needs=("vcpu_id",))
    if bare == "kvm_exit":
        return Event(name, "vm_entry", "return", "vm", decode=decode)
    if bare == "kvm_page_fault":
        return Event(name, "page_fault", decode=decode, needs=("gpa",))
    return Event(name, "host_event", decode=decode, needs=_HOST_EVENT_NEEDS.get(bare, ()))


def _out_of_tree(name: str, bare: str) -> Event:
    role, decode = fields.OUT_OF_TREE[bare]
    needs = ("leaf", "status") if role == "return" else ("leaf",)
    return Event(name, "call", role, "__seamcall", probe="tracepoint", decode=decode, needs=needs)


def _call(name: str, function: str, role: Role, args: str) -> Event:
    slots = dict(KEYS)
    for place, meaning in enumerate(wrappers.signature(function), 1):
        if role == "entry" and meaning in _PASSED_BY_VALUE:
            slots[f"arg{place}"] = KEYS[meaning]
    if role == "return":
        slots["arg1"] = "status"
    if role == "return" and function in _OVERWRITES_ARGS:
        slots |= {"rcx": "out_rcx", "rdx": "out_rdx", "r8": "out_r8"}
    low_level = function.startswith("__seamcall")
    needs = ("fn",) if low_level and role == "entry" else ()
    probe = "seamcall" if low_level else "wrapper"
    if function == HANDLE_EXIT or HANDLE_EXIT in args:
        if "status=" not in args:
            return Event(name, "noise")
        probe, function, role = "vcpu_run", HANDLE_EXIT, "return"
    elif function == "tdx_vcpu_run" or "tdx_vcpu_run" in args:
        probe, function = "vcpu_run", "tdh_vp_enter"
        role = "return" if "status=" in args else role
    return Event(
        name,
        "call",
        role,
        function,
        wrappers.leaf_of(function),
        probe,
        partial(fields.pairs, slots=slots),
        needs + (("status",) if role == "return" else ()),
        slots,
    )


# Most names of noise in the registry, and as many of other events; a hostile file could have a new
# name on every line.
_MAX_NAMES: Final = 4096


@dataclass(slots=True)
class EventRegistry:
    """The events of one source; the ID of an event is its index in ``events``."""

    mappings: Mapping[str, tuple[str, Role | None]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    _known: dict[tuple[str, str | None], int] = field(default_factory=dict)

    def event_id(self, name: str, args: str) -> int:
        """Return the ID of event ``name``; classify it by ``args``, one of its lines, if it is new.

        An entry probe and a return probe with the same name are two events.
        """
        key = name, role_of(args)
        index = self._known.get(key)
        if index is None:
            event = classify(name, args, self.mappings)
            is_noise = event.kind in ("noise", "unmapped")
            if len(self.events) >= _MAX_NAMES * (1 if is_noise else 2):
                key = "(other names)", None
                event = classify(key[0], args, self.mappings)
            index = self._known.setdefault(key, len(self.events))
            if index == len(self.events):
                self.events.append(event)
        return index

    def add(self, event: Event) -> int:
        """Return the ID of the event with this name; add ``event`` if the name is new."""
        index = self._known.setdefault((event.name, None), len(self.events))
        if index == len(self.events):
            self.events.append(event)
        return index
