"""The settings of a run: the sections of all packages put together, named presets, and the command line.

config.py         `PipelineConfig`, which holds a section of each package and checks that they fit together
presets.py        named configurations, a function each
no_effect.py      which given options do nothing
command_line.py   from a command line to a configuration
"""
