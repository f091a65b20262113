"""The search for the fastest or smallest model within a budget.

`candidates` proposes pipelines, `lab` builds and judges what they make, `decision` chooses (plain values in, plain
values out), `sensitivity` finds the layers that cost most, `state` remembers what is known across interruptions, and
`run` brings them together.
"""
