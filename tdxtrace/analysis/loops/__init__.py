"""Analysis loops compiled by :mod:`tdxtrace.compiler`; each applies one rule to ordered calls."""
