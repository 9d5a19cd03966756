"""A simulated TDX host: from a scenario and a seed to recordings and their truth.

Packages, each importing only those before it: ``module`` (the TDX module), ``host`` (CPUs,
kernel locks, SEAMCALLs, the state of a vCPU), ``guest`` (programs and their execution),
``kvm`` (page faults, zaps, life cycle, the loop of a vCPU), ``record`` (recordings of a run,
one writer per format).  ``journal`` stores the calls and events of a run; ``engine`` runs a
scenario; ``truth`` makes its truth tables.
"""
