"""Asking MindSpore's Ascend plugin, without an NPU, which kernels it takes for every graph of every model.

MindSpore's wheel carries the plugin that compiles for Ascend. Where CANN, the driver's side of it, is replaced by empty
stand-ins (`stand_ins`) and MindSpore told to simulate, a graph (`graphs`) compiles as far as the selection of kernels,
which the plugin logs (`kernels`). What selection does not look at, shapes and groups above all, is judged by rules from
CANN's documents (`rules`). `check` puts these together for a list of graphs.

No kernel is built or launched here, so all of this can only find what does not work, not prove what does.
"""
