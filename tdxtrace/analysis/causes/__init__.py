"""Who made a SEAMCALL busy, which rules a kernel broke, and what a lock would have bought."""
