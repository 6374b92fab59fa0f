"""Names and things for the split "fusion" of all tasks.

If a word occurred only in the examples of one task, the gate would learn to recognise the task by
it, and would fail on other words.
"""

from __future__ import annotations

from .task import pools

POOLS = pools("fusion_words")

FIRST_NAMES = POOLS["first_names"]
LAST_NAMES = POOLS["last_names"]
PLACES = POOLS["places"]
THINGS = POOLS["things"]
TOPICS = POOLS["topics"]
