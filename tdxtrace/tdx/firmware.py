"""I/O ports to which a TD's firmware writes marks."""

from __future__ import annotations

from typing import Final

# 0xf4, isa-debug-exit of QEMU, which OVMF and CVM_eval's boot_time_eval_tdx.bt use for them;
# 0x402, OVMF's debug port; 0x80, POST codes.
MARK_PORTS: Final = (0xF4, 0x402, 0x80)
