"""How hypothesis behaves in this suite."""

from __future__ import annotations

from hypothesis import settings

# A deadline would measure whatever else runs on the machine.
settings.register_profile("tdxtrace", deadline=None, print_blob=True)
settings.load_profile("tdxtrace")
