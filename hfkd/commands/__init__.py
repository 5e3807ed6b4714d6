"""The commands of the command line, one verb a file: argument class, parse, call, print.

`build.py` makes the objects that a recipe names, and the work itself lies in the rooms below. Only `cli.py` imports
this room, by the names in its table.
"""
