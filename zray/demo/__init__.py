"""`zray demo`: evolution strategies on a Gymnasium environment, as an ordinary program over zray's public names.

`evolution` is the method (pure: same seed, same numbers), `simulation` the environment, `training` the parallel
program, `report` what a person sees of it: a progress bar, a learning curve as JSON lines and as a picture. It needs
the packages of the `demo` extra (gymnasium, matplotlib) and uses nothing of zray but its public names.
"""
