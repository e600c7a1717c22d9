"""What lies between a simulator and a pi0 checkpoint: one file a simulator. ``base.py`` says what an adapter is."""
