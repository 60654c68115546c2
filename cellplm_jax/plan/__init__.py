"""Planning a run: compile the training step for a TPU slice that is not there, and say what it would cost.

``chips`` knows the hardware, ``hlo`` reads compiled programs, ``roofline`` turns both into a time, ``compiler``
compiles one step for one mesh in a process of its own, ``search`` tries meshes and writes the report.
"""
