"""`make real`: a real language model learns a task that it cannot do, on two processor cores.

    tasks.py      the tasks as conversations: prompts, responses, scores, simple baselines
    demo.py       the run: the base's answers, `tinyft tune`, the answers after it
    report.py     the table, the sampled answers and the figure
    memory.py     peak memory of training on dense and on packed weights, each in a process of its own
"""

from .demo import Settings, run
from .tasks import TASKS, ChatTask, chat_task

__all__ = ["TASKS", "ChatTask", "Settings", "chat_task", "run"]
