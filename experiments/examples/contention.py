"""The engine alone: tasks, flows over shared links, and a device whose streams slow each other.

Eight senders with a card of 25 GB/s each send 1 GB to a receiver of 100 GB/s (incast); then a matmul of 10 ms beside a
collective that slows it to 0.8; then tasks that an executor chooses by priority.
"""

import numpy as np

from meshwright.errors import ScheduleError
from meshwright.simulate.engine import make_tasks, run_tasks

senders, card, receiver = 8, 25e9, 100e9
incast = make_tasks(
    np.zeros(senders),
    executor=[-1] * senders,
    flow_bytes=[1e9] * senders,
    flow_links=(2 * np.arange(senders + 1), [link for k in range(senders) for link in (k, senders)]),
    link_bytes_per_second=[card] * senders + [receiver],
)
print(f"incast: {run_tasks(incast).makespan_seconds * 1e3:.0f} ms, one alone: {1e9 / card * 1e3:.0f} ms")

rates = [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.8, 0.9]]  # by the mask of what goes on: matmul, collective, both
beside = make_tasks([0.010, 0.005], executor=[0, 1], device=[0, 0], activity=[0, 1], interference=[rates])
print("side by side: " + ", ".join(f"{end * 1e3:.2f} ms" for end in run_tasks(beside).end_seconds))

chosen = make_tasks([1.0, 1.0, 1.0], executor=[0, 0, 0], priority=[3.0, 1.0, 2.0])
print("by priority, starts: " + ", ".join(f"{start:.0f}" for start in run_tasks(chosen).start_seconds))

for name, wrong in {
    "a circle": lambda: run_tasks(make_tasks([1.0, 1.0], [0, 1], [[(1, 0.0)], [(0, 0.0)]])),
    "a link of nothing": lambda: make_tasks(
        [0.0], [0], flow_bytes=[1.0], flow_links=([0, 1], [0]), link_bytes_per_second=[0.0]
    ),
    "too much": lambda: make_tasks(np.broadcast_to(1.0, 10**12), executor=0),
}.items():
    try:
        wrong()
    except ScheduleError as error:
        print(f"{name}: {str(error).split(';')[0].split(' need about')[0]}")
