"""Imported last by the process of which ranks are forks: garbage collection in a fork skips what was imported before.

A run collects once before its first step, which takes longer than a step of a tiny system if all of torch is searched.
"""

import gc

gc.freeze()
