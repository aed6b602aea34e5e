"""`any2point bench`: the ops, and a whole step, measured on this machine and compared.

A result is checked against the reference before it is timed; a wrong one gets no time and no speed-up.
`any2point.bench.cases` says what is measured, `timing` how, `step` splits a training step into its parts.
"""

from __future__ import annotations
