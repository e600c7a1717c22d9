"""The parts of the tabletop simulator: hashing, episodes, physics, tasks, expert, language, domains and rendering."""
