"""What policies/token_vla.py is made of."""
