"""Simulators that hold one environment per process: N slots over worker processes, as one batched ``Environment``.

``single`` says what a simulator gives: one environment in numpy. ``environment.WorkerEnvironment`` makes a batch of it, ``pool``
keeps the processes (replaces those that crash or hang), ``process`` is what runs in them, ``board`` the memory they share, and
``server`` what ends them all when the run is killed.
"""
