"""The host below KVM: processors, kernel locks, SEAMCALLs, the state of a vCPU."""
