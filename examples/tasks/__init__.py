"""The example tasks, one file each, by adapter name."""

from .headline import TASK as HEADLINE
from .json_fields import TASK as JSON_FIELDS
from .label import TASK as LABEL
from .pirate import TASK as PIRATE
from .sql import TASK as SQL
from .task import Example, Task

TASKS: dict[str, Task] = {task.name: task for task in (JSON_FIELDS, SQL, LABEL, PIRATE, HEADLINE)}

__all__ = ["TASKS", "Example", "Task"]
