"""The pieces policies.pi0 is made of."""
