"""Offsets of structure members, from BTF, the kernel's type data."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tdxtrace.errors import FormatError, InputError
from tdxtrace.tables.text import one_line

# Layout of BTF: Linux Documentation/bpf/btf.rst, include/uapi/linux/btf.h.
_MAGIC: Final = 0xEB9F
_HEADER: Final = struct.Struct("<HBBIIIII")
_TYPE: Final = struct.Struct("<III")
_MEMBER: Final = struct.Struct("<III")
_STRUCT, _UNION, _FUNC_PROTO, _DATASEC, _ENUM, _ENUM64 = 4, 5, 13, 15, 6, 19
_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG = 8, 9, 10, 11, 18
_ALIASES: Final = (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG)
# Bytes that follow struct btf_type, by kind: fixed, and per element.
_FIXED: Final = {1: 4, 3: 12, 14: 4, 17: 4}
_EACH: Final = {_STRUCT: 12, _UNION: 12, _ENUM: 8, _FUNC_PROTO: 8, _DATASEC: 12, _ENUM64: 12}
_KINDS: Final = 20
_MAX_BYTES: Final = 256 << 20
_MAX_DEPTH: Final = 16


@dataclass(slots=True)
class Btf:
    """Types of a kernel, or of a module that extends the types of its kernel."""

    data: bytes
    shown: str
    base: Btf | None = None
    _at: list[int] = field(default_factory=list)
    """Offset of each type, without those of the base."""
    _strings: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        try:
            self._index()
        except struct.error:
            raise FormatError(f"{self.shown} is truncated BTF") from None

    @property
    def n_types(self) -> int:
        """Number of types including those of the base; type 0 is void."""
        return len(self._at) + (1 if self.base is None else self.base.n_types)

    def offset_of(self, structure: str, member: str) -> int | None:
        """Return the byte offset of a member; searches anonymous members too.

        Args:
            structure: Name of the struct, such as "vcpu_tdx".
            member: Name of the member.

        Returns:
            Bytes from the start of the struct; None if the member does not exist, or is a bit field
            that does not begin at a byte.

        Raises:
            FormatError: If the data is damaged.
        """
        try:
            for at in self._structures(structure):
                bits = self._bits(at, member, 0)
                if bits is not None:
                    return None if bits % 8 else bits // 8
        except (struct.error, IndexError):
            raise FormatError(f"{self.shown} is damaged BTF") from None
        return None if self.base is None else self.base.offset_of(structure, member)

    def _index(self) -> None:
        magic, _, _, size, type_at, type_len, string_at, string_len = _HEADER.unpack_from(self.data)
        if magic != _MAGIC:
            raise FormatError(f"{self.shown} is not little-endian BTF")
        at, end = size + type_at, size + type_at + type_len
        if max(end, size + string_at + string_len) > len(self.data):
            raise FormatError(f"{self.shown} is truncated BTF")
        self._strings = size + string_at, string_len
        while at < end:
            self._at.append(at)
            _, info, _ = _TYPE.unpack_from(self.data, at)
            kind, n = info >> 24 & 0x1F, info & 0xFFFF
            if not 0 < kind < _KINDS:
                raise FormatError(f"{self.shown} has BTF of an unknown kind, {kind}")
            at += _TYPE.size + _FIXED.get(kind, 0) + n * _EACH.get(kind, 0)

    def _structures(self, name: str) -> Iterator[int]:
        wanted = name.encode()
        for at in self._at:
            where, info, _ = _TYPE.unpack_from(self.data, at)
            if info >> 24 & 0x1F == _STRUCT and self._string(where) == wanted:
                yield at

    def _bits(self, at: int, member: str, depth: int) -> int | None:
        """Return the bit offset of ``member`` in the struct or union at ``at``."""
        _, info, _ = _TYPE.unpack_from(self.data, at)
        unnamed = []
        where: int
        kind: int
        for n in range(info & 0xFFFF):
            where, kind, offset = _MEMBER.unpack_from(self.data, at + 12 + n * 12)
            bits: int = offset & 0xFF_FFFF if info >> 31 else offset
            name = self._string(where)
            if name == member.encode():
                return bits
            if not name:
                unnamed.append((kind, bits))
        if depth < _MAX_DEPTH:
            for kind, bits in unnamed:
                inner = self._inside(kind, member, depth + 1)
                if inner is not None:
                    return bits + inner
        return None

    def _inside(self, number: int, member: str, depth: int) -> int | None:
        """Return the bit offset of ``member`` in type ``number``; None if not a struct or union."""
        if self.base is not None and number < self.base.n_types:
            return self.base._inside(number, member, depth)
        first = 1 if self.base is None else self.base.n_types
        if not number:
            return None
        at = self._at[number - first]
        _, info, target = _TYPE.unpack_from(self.data, at)
        kind = info >> 24 & 0x1F
        if kind in _ALIASES and depth < _MAX_DEPTH:
            return self._inside(target, member, depth + 1)
        return self._bits(at, member, depth) if kind in (_STRUCT, _UNION) else None

    def _string(self, where: int) -> bytes:
        """Return the name at a string offset; offsets past the base's strings are the module's."""
        before = 0 if self.base is None else self.base._n_string_bytes
        if self.base is not None and where < before:
            return self.base._string(where)
        at = self._strings[0] + where - before
        return self.data[at : self.data.index(b"\0", at)] if at < len(self.data) else b""

    @property
    def _n_string_bytes(self) -> int:
        return self._strings[1] + (0 if self.base is None else self.base._n_string_bytes)


def open_btf(paths: Sequence[Path]) -> Btf:
    """Read BTF from files of /sys/kernel/btf, or ELF files (vmlinux, kvm_intel.ko) with a section.

    Args:
        paths: One file, or the kernel's followed by a module's, whose types refer to the kernel's.

    Raises:
        InputError: If a file cannot be read.
        FormatError: If a file has no BTF, or is damaged.
    """
    made: Btf | None = None
    for path in paths:
        made = Btf(_bytes(path), one_line(str(path)), made)
    if made is None:
        raise InputError("no BTF file was named")
    return made


def _bytes(path: Path) -> bytes:
    shown = one_line(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {shown}: {error.strerror}") from None
    if data.startswith(b"\x7fELF"):
        return _section(data, shown)
    return data


def _section(data: bytes, shown: str) -> bytes:
    import io  # noqa: PLC0415 - only for ELF files

    from elftools.common.exceptions import ELFError  # noqa: PLC0415
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415

    try:
        found = ELFFile(io.BytesIO(data)).get_section_by_name(".BTF")
        body = None if found is None else bytes(found.data())
    except (ELFError, ValueError, struct.error):
        raise FormatError(f"{shown} is a damaged ELF file") from None
    if body is None:
        raise FormatError(f"{shown} has no BTF; the kernel needs CONFIG_DEBUG_INFO_BTF")
    return body
