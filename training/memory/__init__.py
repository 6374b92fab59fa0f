"""What a run takes of memory: estimated before, rehearsed, measured."""
