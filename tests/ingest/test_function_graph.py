"""Output of the function_graph tracer for the wrappers."""

from __future__ import annotations

from typing import Any

import pytest
from support.texts import BUSY, is_accounted_for, lost, read_text

from tdxtrace.errors import FormatError

HEAD = """\
# tracer: function_graph
#
#     TIME        CPU  TASK/PID         DURATION                  FUNCTION CALLS
#      |          |     |    |           |   |                     |   |   |   |
"""
ARGS = "(td=0xff11000123456000, gpa=0x80000000, level=0, page=0xffd40000)"


def graph(*rows: str) -> str:
    """Lines with absolute time, CPU 1 and task CPU 0/KVM-7; each 10 us after the last."""
    lines = [
        f"   50.{10 * n:06} |   1)  CPU 0/KVM-7    |   {row}\n" for n, row in enumerate(rows, 1)
    ]
    return HEAD + "".join(lines)


def calls(text: str, *names: str) -> list[tuple[Any, ...]]:
    trace = read_text(text)
    trace.check()
    assert is_accounted_for(trace)
    assert trace.provenance.sources[0].format == "function-graph"
    return trace.seamcalls.sort("seq").select(names).rows()


@pytest.mark.parametrize(
    ("note", "status"),
    [
        ("ret=0x0", 0),
        ("ret=0x8000020000000092", BUSY),
        ("ret=0", 0),
        ("= 0x0", 0),
        ("= 0", 0),
        ("= 0x8000020000000092", BUSY),
        ("ret=-9223369837831520110", BUSY),
        ("<-tdx_sept_set_private_spte ret=0x30", 0x30),
    ],
)
def test_a_call_on_one_line_is_whole(note: str, status: int) -> None:
    text = graph(f"  1.235 us    |  tdh_mem_page_aug{ARGS}; /* {note} */")
    names = ("leaf", "td_id", "gpa", "level", "status", "start_ns", "end_ns", "tid", "cpu")
    assert calls(text, *names, "probe", "n_lines") == [
        (
            *(6, 0xFF11_0001_2345_6000, 0x8000_0000, 0, status),
            *(50_000_010_000, 50_000_011_235, 7, 1),
            *("function_graph", 1),
        )
    ]


@pytest.mark.parametrize(
    ("shown", "took_ns"),
    [
        ("@ 1234.567 us", 1_234_567),
        ("* 28123.45 us", 28_123_450),
        ("# 281234.5 us", 281_234_500),
        ("$ 2812345 us", 2_812_345_000),
        ("  28123.45 us", 28_123_450),  # without funcgraph-overhead
    ],
)
def test_long_calls_have_fewer_digits_behind_the_point(shown: str, took_ns: int) -> None:
    """print_graph_duration prints 7 digits: the longest calls must not be missing."""
    text = graph(f"{shown} |  tdh_sys_init(); /* ret=0x0 */")
    begun = 50_000_010_000
    assert calls(text, "leaf", "start_ns", "end_ns") == [(33, begun, begun + took_ns)]
    end = f"{shown} |  }} /* tdh_sys_init ret=0x0 */"
    text = graph("              |  tdh_sys_init() {", end)
    assert calls(text, "leaf", "status") == [(33, 0)]


def test_counts_of_calls_that_were_passed_over() -> None:
    """funcgraph-overrun: what was passed over is a loss."""
    text = graph("  1.235 us    |  tdh_vp_flush(vp=0x1); /* ret=0x0 */")
    assert lost(read_text(text + " (Overruns: 0)\n")) == {}
    assert lost(read_text(text + " (Overruns: 3)\n")) == {"unparsed": 1}


ROW = "  1.235 us    |  tdh_vp_flush(vp=0x1); /* ret=0x0 */"


@pytest.mark.parametrize(
    ("line", "what", "instead"),
    [
        (f"   50.000010 |   CPU 0/K-7    |   {ROW}", "without the CPUs", "funcgraph-cpu"),
        (f"   50.000010 |   {ROW}", "without the CPUs", "funcgraph-cpu"),
        (ROW, "without the CPUs", "funcgraph-cpu"),
        (f"       10 us |   1)  CPU 0/K-7    |   {ROW}", "latency tracer", "funcgraph-abstime"),
        (f"       10 us |   1)  CPU 0/K-7    |  d..1. | {ROW}", "latency tracer", "current_tracer"),
        (
            "   50.000010 |   1)  CPU 0/K-7    |  tdh_vp_flush(vp=0x1); /* ret=0x0 */",
            "without funcgraph-duration",
            "options/funcgraph-duration",
        ),
        (
            "   50.000010 |   1)  CPU 0/K-7    |   1.235 us    |  tdh_vp_flush(vp=0x1);",
            "without ret=",
            "options/funcgraph-retval",
        ),
    ],
)
def test_the_option_that_is_missing_is_named(line: str, what: str, instead: str) -> None:
    for text in (f"{line}\n", f"{HEAD}{line}\n"):
        with pytest.raises(FormatError, match=what) as raised:
            read_text(text)
        assert instead in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "end",
    [
        "} /* tdh_mem_page_aug ret=0x8000020000000092 */",
        "} /* tdh_mem_page_aug = 0x8000020000000092 */",
        "} /* tdh_mem_page_aug [vmlinux] ret=0x8000020000000092 */",
    ],
)
def test_a_call_with_children_is_two_lines(end: str) -> None:
    text = graph(
        f"              |  tdh_mem_page_aug{ARGS} {{",
        "  0.235 us    |    sc_retry(); /* ret=0x0 */",
        f"  9.100 us    |  {end}",
    )
    names = ("leaf", "gpa", "status", "start_ns", "end_ns", "n_lines")
    assert calls(text, *names) == [
        (6, 0x8000_0000, BUSY, 50_000_010_000, 50_000_030_000, 2),
    ]


def test_a_brace_without_a_name_closes_what_is_indented_as_it() -> None:
    """funcgraph-tail is off by default."""
    text = graph(
        "              |  tdx_sept_remove_private_spte() {",
        f"              |    tdh_mem_page_aug{ARGS} {{",
        "              |      clflush_cache_range() {",
        "  2.000 us    |        tdh_mem_track(td=0x1); /* ret=0x0 */",
        "  9.000 us    |      } /* ret=0x7 */",
        "  9.100 us    |    } /* ret=0x8000020000000092 */",
        "  9.900 us    |  } /* ret=0x0 */",
    )
    assert calls(text, "leaf", "status") == [(38, 0), (6, BUSY)]
    assert lost(read_text(text)) == {"noise": 4}


@pytest.mark.parametrize(
    "between", ["CPU:1 [LOST 7 EVENTS]", "   50.000015 |   0)  qemu-9    |   9.100 us |  }"]
)
def test_a_brace_closes_nothing_after_a_loss_or_of_another_thread(between: str) -> None:
    first, last = graph(
        f"              |  tdh_mem_page_aug{ARGS} {{", "  9.100 us    |  } /* ret=0x0 */"
    ).splitlines()[-2:]
    rows = calls(f"{HEAD}{first}\n{between}\n{last}\n", "leaf", "status")
    assert rows == [(6, None if "LOST" in between else 0)]


@pytest.mark.parametrize("task", ["CPU 0/KVM-7    |  ", ""])
@pytest.mark.parametrize("flags", ["d..1. |  ", ""])
def test_without_a_column_for_durations_calls_with_children_are_read(task: str, flags: str) -> None:
    """Of a call on one line it is not known when it ended: that is a loss."""
    bodies = (
        f"tdh_mem_page_aug{ARGS} {{",
        "  f();",
        "} /* ret=0x0 */",
        "tdh_mem_track(); /* ret=0x0 */",
    )
    text = HEAD + "".join(
        f"   50.{10 * n:06} |   1)  {task}{flags}{body}\n" for n, body in enumerate(bodies, 1)
    )
    assert calls(text, "leaf", "start_ns", "end_ns") == [(6, 50_000_010_000, 50_000_030_000)]
    assert lost(read_text(text))["undecoded"] == 1


def test_calls_nest() -> None:
    text = graph(
        "              |  tdx_sept_remove_private_spte() {",
        "              |    tdh_mem_range_block(td=0x1, gpa=0x1000, level=0) {",
        "  2.000 us    |      tdh_mem_track(td=0x1); /* ret=0x0 */",
        "  9.100 us    |    } /* tdh_mem_range_block ret=0x0 */",
        "  9.900 us    |  } /* tdx_sept_remove_private_spte ret=0x0 */",
    )
    assert calls(text, "leaf", "gpa", "td_id") == [(38, None, 1), (7, 0x1000, 1)]
    assert lost(read_text(text)) == {"noise": 2}


@pytest.mark.parametrize("mark", ["+", "!", "#", "*", "@", "$", " "])
def test_marks_of_long_durations_are_no_part_of_it(mark: str) -> None:
    text = graph(f"{mark} 9504.656 us |  tdh_mem_track(td=0x1); /* ret=0x0 */")
    assert calls(text, "start_ns", "end_ns") == [(50_000_010_000, 50_009_514_656)]


def test_arguments_may_be_missing() -> None:
    text = graph("  1.000 us    |  tdh_mem_page_aug(); /* ret=0x0 */")
    assert calls(text, "leaf", "gpa", "td_id", "status") == [(6, None, None, 0)]


def test_without_a_column_for_tasks_switches_tell_who_runs() -> None:
    text = (
        "   50.000010 |   1)   1.000 us    |  tdh_mem_track(td=0x1); /* ret=0x0 */\n"
        " ------------------------------------------\n"
        "   1)    <idle>-0    =>  CPU 0/KVM-7   \n"
        " ------------------------------------------\n"
        "\n"
        "   50.000020 |   1)   1.000 us    |  tdh_mem_track(td=0x1); /* ret=0x0 */\n"
        "   50.000025 |   2)   1.000 us    |  tdh_mem_track(td=0x2); /* ret=0x0 */\n"
        "   1)   CPU 0/KVM-7  =>  CPU 1/KVM-8   \n"
        "   50.000030 |   1)   1.000 us    |  tdh_mem_track(td=0x1); /* ret=0x0 */\n"
    )
    assert calls(text, "tid", "cpu") == [(None, 1), (7, 1), (None, 2), (8, 1)]


def test_a_column_for_tasks_tells_who_runs_until_the_next() -> None:
    text = (
        "   50.000010 |   1)  CPU 0/KVM-7    |   1.000 us    |  tdh_mem_track(); /* ret=0x0 */\n"
        "   50.000020 |   1)   1.000 us    |  tdh_mem_track(); /* ret=0x0 */\n"
        "   50.000020 |   2)   1.000 us    |  tdh_mem_track(); /* ret=0x0 */\n"
    )
    assert calls(text, "tid", "cpu") == [(7, 1), (7, 1), (None, 2)]


def test_a_call_that_a_switch_interrupts_goes_on_in_its_thread() -> None:
    text = (
        "   1)    <idle>-0    =>  CPU 0/KVM-7   \n"
        "   50.000010 |   1)               |  tdh_mem_page_aug(gpa=0x1000) {\n"
        "   1)   CPU 0/KVM-7  =>  CPU 1/KVM-8   \n"
        "   50.000020 |   1)               |  tdh_mem_page_aug(gpa=0x2000) {\n"
        "   50.000030 |   1)   9.000 us    |  } /* tdh_mem_page_aug ret=0x2 */\n"
        "   1)   CPU 1/KVM-8  =>  CPU 0/KVM-7   \n"
        "   50.000040 |   1)   9.000 us    |  } /* tdh_mem_page_aug ret=0x1 */\n"
    )
    assert calls(text, "tid", "gpa", "status") == [(8, 0x2000, 2), (7, 0x1000, 1)]


def test_flags_of_the_latency_format_tell_interrupt_context() -> None:
    text = (
        "   50.000010 |   1)  CPU 0/KVM-7    | d.h1. |   1.000 us    |  "
        "tdh_vp_flush(vp=0x1); /* ret=0x0 */\n"
        "   50.000020 |   1)  CPU 0/KVM-7    | ..... |   1.000 us    |  "
        "tdh_vp_flush(vp=0x1); /* ret=0x0 */\n"
    )
    assert calls(text, "in_irq", "vp_id") == [(True, 1), (False, 1)]


def test_without_absolute_time_there_is_no_row_and_the_option_is_named() -> None:
    text = (
        "# tracer: function_graph\n 1)   1.000 us    |  tdh_mem_page_aug(); /* ret=0x0 */\n"
        " 1)   1.000 us    |  tdh_mem_page_aug(); /* ret=0x0 */\n"
    )
    with pytest.raises(FormatError, match="funcgraph-abstime"):
        read_text(text)


def test_without_a_return_value_there_is_no_row() -> None:
    text = graph(
        "  1.000 us    |  tdh_mem_page_aug();",
        "  1.000 us    |  tdh_mem_track(td=0x1); /* ret=0x0 */",
    )
    trace = read_text(text)
    assert trace.seamcalls["leaf"].to_list() == [38]
    assert lost(trace) == {"undecoded": 1}
    assert is_accounted_for(trace)


def test_other_functions_and_comments_of_the_tracer_are_noise() -> None:
    text = graph(
        "              |  kvm_mmu_page_fault() {",
        "  0.668 us    |    _spin_lock();",
        "              |  /* kvm_page_fault: address 1000 */",
        "  1.000 us    |  tdh_mem_track(td=0x1); /* ret=0x0 */",
        "  9.000 us    |  }",
    )
    trace = read_text(text)
    assert is_accounted_for(trace)
    assert lost(trace) == {"noise": 4}


def test_lost_events_are_read_here_too() -> None:
    text = graph("  1.000 us    |  tdh_mem_track(td=0x1); /* ret=0x0 */")
    text += "CPU:1 [LOST 7 EVENTS]\n" + graph(
        "  1.000 us    |  tdh_mem_track(td=0x1); /* ret=0x0 */"
    ).replace(" 50.", " 51.")
    trace = read_text(text)
    gap = trace.losses.filter(kind="lost_events").row(0, named=True)
    assert (gap["cpu"], gap["n_events"], gap["n_lines"]) == (1, 7, 1)
    assert (gap["start_ns"], gap["end_ns"]) == (50_000_010_000, 51_000_010_000)


def test_chains_are_found_as_from_any_other_capture() -> None:
    from tdxtrace.analysis.retry_chains import retry_chains

    text = graph(
        f"  1.000 us    |  tdh_mem_page_aug{ARGS}; /* ret=0x8000020000000092 */",
        f"  1.000 us    |  tdh_mem_page_aug{ARGS}; /* ret=0x8000020000000092 */",
        f"  1.000 us    |  tdh_mem_page_aug{ARGS}; /* ret=0x0 */",
    )
    trace = read_text(text)
    chains = retry_chains(trace.seamcalls, trace.losses)
    assert chains.select("gpa", "n_attempts", "outcome", "took_ns").rows() == [
        (0x8000_0000, 3, "succeeded", 21_000),
    ]


def test_the_clock_is_that_of_the_stamps_not_of_the_durations() -> None:
    """The end of one call may seem to lie after the start of the next, by less than a stamp."""
    trace = read_text(graph(f"  1.095 us    |  tdh_mem_page_aug{ARGS}; /* ret=0x0 */"))
    assert trace.provenance.sources[0].clock_resolution_ns == 1000
