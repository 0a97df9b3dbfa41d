"""`picotron doctor`: what this machine can train, and the line that mends what it cannot.

The parent never imports torch, so it outlives any way in which torch can fail:

    command.py    gathers the report, prints it, and decides the exit code
    machine.py    the machine as the system tells it
    disk.py       the folder of runs: writing speed and space
    child.py      runs examine.py in child processes, and says what one of them died of
    problems.py   report -> problems, each one line with its fix
    show.py       report -> text (size.py: bytes as people read them)

In the child:

    examine.py    the order of things, each announced before it is done
    facts.py      torch's import, its build, its devices
    launch.py     one kernel on one device in one dtype
    rates.py      copies and matrix products
"""
