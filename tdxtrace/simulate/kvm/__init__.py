"""KVM: VMs, page faults, zaps, TD life cycle, and the loop that runs a vCPU."""
