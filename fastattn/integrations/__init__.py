"""What joins fastattn to other libraries: a module for each, which imports it.

Nothing here is imported with `fastattn`.
"""
