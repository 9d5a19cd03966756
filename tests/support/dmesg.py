"""What the installed dmesg of util-linux prints of a log, with all its options."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

# util-linux 2.38, sys-utils/dmesg.1.adoc: the options that change what is printed.
_DMESG: Final = (
    *"-d -e -H -J -r -T -t -x -p -k --noescape --color=always".split(),
    *(f"--time-format={name}" for name in "delta reltime ctime notime iso".split()),
)


def printed_by_dmesg(
    folder: Path, messages: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """Yield what the installed dmesg prints of messages, with each option and pair of them."""
    log = "".join(f"<{3 + n % 3}>[  896.{n:06}] {text}\n" for n, text in enumerate(messages))
    (folder / "raw").write_text(log)
    seen: set[bytes] = set()
    single: list[tuple[str, ...]] = [(), *((option,) for option in _DMESG)]
    for options in (*single, *itertools.combinations(_DMESG, 2)):
        command = ["dmesg", "-P", "-F", str(folder / "raw"), *options]
        text = subprocess.run(command, capture_output=True, check=False).stdout
        if text.strip() and text not in seen:
            seen.add(text)
            yield options, text
