"""The memory that a run needs: estimated, rehearsed and measured."""
