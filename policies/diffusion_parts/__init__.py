"""The parts of ``policies.diffusion``: options, schedules, loading, prompts, and the random walk of a picture."""
