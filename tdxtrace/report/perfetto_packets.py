"""Writer of slices as packets of a Perfetto trace: tracks, interned names, flows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final

TrackKey = tuple[int, int | None, str, int]
"""Input, thread ID (None: the whole input), name of the track, and lane.  Slices of one lane must
nest; slices of different lanes may overlap."""

# Arbitrary ID, not 0 and equal in all packets, because names are interned per sequence:
# perfetto, trace_packet.proto, trusted_packet_sequence_id.
_SEQUENCE: Final = 1


@dataclass(frozen=True, slots=True)
class Slice:
    """An interval on a track, or an instant if its start or end is None."""

    track: TrackKey
    name: str
    start_ns: int | None
    end_ns: int | None
    details: Mapping[str, str | int]
    flows: Sequence[int] = ()
    """IDs of the flows that pass through or end at this slice, ordered by time."""


@dataclass(slots=True)
class PacketWriter:
    """Writer of packets; names are interned when they first occur.

    Raises:
        ImportError: If the package ``perfetto`` is not installed.
    """

    file: IO[bytes]
    order: Sequence[str]
    """Names of the tracks of a thread, from top to bottom."""
    n_packets: int = 0
    _proto: Any = field(init=False)
    _writer: Any = field(init=False)
    _tracks: dict[tuple[Any, ...], int] = field(default_factory=dict)
    _names: dict[str, int] = field(default_factory=dict)
    _keys: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2  # noqa: PLC0415
        from perfetto.trace_builder import proto_builder  # noqa: PLC0415

        self._proto = perfetto_trace_pb2
        self._writer = proto_builder.StreamingTraceProtoBuilder(self.file)
        packet = self._packet()
        packet.sequence_flags = self._proto.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        self._write(packet)

    def thread(self, source: int, tid: int, tgid: int | None, name: str, file: str) -> None:
        """Write the descriptor of a thread's track, a child of its process, else of its input."""
        track, is_new = self._track(source, tid)
        if not is_new:
            return
        parent = self._input(source, file) if tgid is None else self._process(source, tgid, file)
        packet = self._packet()
        described = packet.track_descriptor
        described.uuid, described.parent_uuid = track, parent
        described.name = f"{name} {tid}"
        described.child_ordering = described.EXPLICIT
        if source == 0 and tgid is not None:
            # A thread descriptor merges the track with the thread of sched events. Only the first
            # input gets one, because thread IDs of several inputs may coincide.
            described.thread.pid, described.thread.tid = tgid, tid
            described.thread.thread_name = name
        self._write(packet)

    def add(self, made: Slice) -> None:
        """Write a slice or an instant on its track."""
        track = self._track_of(made.track)
        times = [ns for ns in (made.start_ns, made.end_ns) if ns is not None]
        is_slice = len(times) == 2
        event = self._proto.TrackEvent
        packet = self._packet(times[0])
        packet.sequence_flags = self._proto.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        packet.track_event.type = event.TYPE_SLICE_BEGIN if is_slice else event.TYPE_INSTANT
        packet.track_event.track_uuid = track
        packet.track_event.name_iid = self._name(packet, made.name)
        packet.track_event.flow_ids.extend(made.flows)
        for key, value in made.details.items():
            note = packet.track_event.debug_annotations.add()
            note.name_iid = self._key(packet, key)
            if isinstance(value, int):
                note.int_value = value
            else:
                note.string_value = value
        self._write(packet)
        if is_slice:
            packet = self._packet(times[1])
            packet.track_event.type = event.TYPE_SLICE_END
            packet.track_event.track_uuid = track
            self._write(packet)

    def _packet(self, ns: int | None = None) -> Any:  # noqa: ANN401 - generated classes
        packet = self._writer.create_packet()
        packet.trusted_packet_sequence_id = _SEQUENCE
        if ns is not None:
            packet.timestamp = ns
        return packet

    def _write(self, packet: Any) -> None:  # noqa: ANN401
        self._writer.write_packet(packet)
        self.n_packets += 1

    def _track(self, *key: Any) -> tuple[int, bool]:  # noqa: ANN401 - hashable
        """Return the UUID of a track, and whether it is new."""
        is_new = key not in self._tracks
        return self._tracks.setdefault(key, len(self._tracks) + 1), is_new

    def _input(self, source: int, name: str) -> int:
        track, is_new = self._track(source)
        if is_new:
            packet = self._packet()
            packet.track_descriptor.uuid = track
            packet.track_descriptor.name = name
            self._write(packet)
        return track

    def _process(self, source: int, tgid: int, file: str) -> int:
        track, is_new = self._track(source, "process", tgid)
        if is_new:
            parent = self._input(source, file)
            packet = self._packet()
            packet.track_descriptor.uuid = track
            packet.track_descriptor.parent_uuid = parent
            packet.track_descriptor.name = f"process {tgid}"
            if source == 0:
                packet.track_descriptor.process.pid = tgid
            self._write(packet)
        return track

    def _track_of(self, key: TrackKey) -> int:
        source, tid, name, _ = key
        track, is_new = self._track(*key)
        if is_new:
            packet = self._packet()
            packet.track_descriptor.uuid = track
            parent = self._input(source, f"input {source}")
            if tid is not None:
                self.thread(source, tid, None, "thread", f"input {source}")
                parent, _ = self._track(source, tid)
            packet.track_descriptor.parent_uuid = parent
            packet.track_descriptor.name = name
            packet.track_descriptor.sibling_order_rank = self.order.index(name)
            self._write(packet)
        return track

    def _name(self, packet: Any, name: str) -> int:  # noqa: ANN401
        if name not in self._names:
            self._names[name] = len(self._names) + 1
            entry = packet.interned_data.event_names.add()
            entry.iid, entry.name = self._names[name], name
        return self._names[name]

    def _key(self, packet: Any, name: str) -> int:  # noqa: ANN401
        if name not in self._keys:
            self._keys[name] = len(self._keys) + 1
            entry = packet.interned_data.debug_annotation_names.add()
            entry.iid, entry.name = self._keys[name], name
        return self._keys[name]
