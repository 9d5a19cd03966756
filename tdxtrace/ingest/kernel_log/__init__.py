"""The kernel's log: dmesg, syslog, the journal, a serial console."""
