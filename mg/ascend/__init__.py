"""Asks MindSpore's Ascend plugin, without an NPU, which kernels it selects for every graph of every model.

MindSpore's wheel contains the plugin that compiles for Ascend. If CANN, the driver side, is replaced by empty stand-ins
(`stand_ins`) and MindSpore is told to simulate, a graph (`graphs`) compiles as far as kernel selection, which the
plugin logs (`kernels`). What selection ignores, mainly shapes and groups, is checked by rules from CANN's documents
(`rules`). `check` combines these for a list of graphs.

No kernel is built or launched, so this can only find what does not work, not prove what does.
"""
