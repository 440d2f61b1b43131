"""`make gpu`: what can be known only on a real GPU, measured in one command. docs/gpu.md says how to run it.

`python -m tests.gpu` runs the stages, each a process of its own with its share of the time; they write what they
found into `OUTPUT/STAGE/record.json` as they find it, and so go on where an earlier call ended.
"""
