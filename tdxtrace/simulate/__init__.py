"""A simulated TDX host: from a scenario and a seed to recordings and their truth.

Packages, each importing only those before it: ``module`` (the TDX module), ``host`` (CPUs,
kernel locks, SEAMCALLs, the state of a vCPU), ``guest`` (programs and their execution),
``kvm`` (page faults, zaps, life cycle, the loop of a vCPU), ``record`` (what tools record of
a run, one writer per format).  ``journal`` holds what happened; ``engine`` runs a scenario;
``truth`` makes its truth tables.
"""
