"""Facts on a Dask cluster, and in an object store."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal
from support.fleet import HereEngine, die_of_poison, digest_of, facts_at, mapped

from tdxtrace.analysis.attempts import curves_of
from tdxtrace.errors import InputError
from tdxtrace.fleet.engine import open_engine
from tdxtrace.fleet.mapping import MapSummary, map_traces
from tdxtrace.fleet.merge import count_fleet, open_facts
from tdxtrace.fleet.storage import open_storage, trace_inputs

BUCKET = "bucket"


@pytest.fixture(scope="module")
def facts(traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The facts of the four hosts, counted in this process."""
    place = tmp_path_factory.mktemp("here") / "facts"
    mapped(place, traces)
    return place


@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster_writes_the_same_facts_though_workers_die(
    traces: Path, facts: Path, tmp_path: Path
) -> None:
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    folder = tmp_path / "traces"
    folder.mkdir()
    for path in traces.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "poison.txt").write_text("kills its worker")
    engine = open_engine("local", 2)
    killed: list[int] = []

    def kill_one(summary: MapSummary) -> None:
        """Kill a worker at the first report at which one answers: others may be dying."""
        if summary.n_done and not killed:
            client = distributed.get_client()
            for pid in client.run(os.getpid, on_error="ignore").values():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                break

    try:
        storage = open_storage(str(tmp_path / "facts"))
        inputs = trace_inputs([str(folder)])
        done = map_traces(inputs, storage, engine, report=kill_one, run=die_of_poison)
    finally:
        engine.close()
    assert killed
    assert (done.n_done + done.n_there, done.n_failed) == (4, 1)
    # The origin of a trace is its place, which is another one here.
    ours, theirs = facts_at(tmp_path / "facts"), facts_at(facts)
    assert_frame_equal(ours.parts.drop("origin"), theirs.parts.drop("origin"))
    marks = {"provenance.json"}
    assert {n: c for n, c in digest_of(tmp_path / "facts").items() if n[-15:] not in marks} == {
        n: c for n, c in digest_of(facts).items() if n[-15:] not in marks
    }


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket on a server in this process."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    import s3fs

    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(BUCKET)
    yield f"s3://{BUCKET}"
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


@pytest.mark.filterwarnings("ignore")
def test_traces_and_facts_may_be_in_an_object_store(traces: Path, facts: Path, bucket: str) -> None:
    import fsspec

    files = fsspec.filesystem("s3")
    for path in traces.iterdir():
        files.pipe_file(f"{BUCKET}/traces/day 1/{path.name}", path.read_bytes())
    inputs = trace_inputs([f"{bucket}/traces/*/host*"])
    assert len(inputs) == 4
    storage = open_storage(f"{bucket}/facts")
    assert map_traces(inputs, storage, HereEngine()).n_done == 4
    again = map_traces(trace_inputs([f"{bucket}/traces"]), storage, HereEngine())
    assert (again.n_there, again.n_done) == (4, 0)
    ours, theirs = open_facts(storage), facts_at(facts)
    assert ours.digest == theirs.digest
    curves = [curves_of(count_fleet(each).whole) for each in (ours, theirs)]
    assert_frame_equal(*curves, check_exact=True)
    with pytest.raises(InputError, match="no trace at"):
        trace_inputs([f"{bucket}/nothing"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match=r"pip install 'tdxtrace\[fleet\]'"):
        open_engine("local", 1)
    with pytest.raises(InputError, match=r"s3://b/x needs fsspec; pip install"):
        open_storage("s3://b/x")
