"""The example tasks, one file each, by name."""

from .headline import TASK as HEADLINE
from .json_fields import TASK as JSON_FIELDS
from .label import TASK as LABEL
from .language import TASK as LANGUAGE
from .pirate import TASK as PIRATE
from .sentiment import TASK as SENTIMENT
from .sql import TASK as SQL
from .task import Example, Task, TaskData

# The tasks for which train_examples.py makes an adapter of the same name.
TASKS: dict[str, Task] = {task.name: task for task in (JSON_FIELDS, SQL, LABEL, PIRATE)}
# The tasks that have data, including those whose adapters are trained in other ways.
DATA: dict[str, TaskData] = {
    **TASKS,
    **{task.name: task for task in (HEADLINE, LANGUAGE, SENTIMENT)},
}

__all__ = ["DATA", "TASKS", "Example", "Task", "TaskData"]
