"""Causes of busy SEAMCALLs, kernel rules that were broken, and effects of a lock."""
