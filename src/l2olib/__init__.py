"""Learned optimizers, their guards, and the experiments of the book.

Every module stands alone; import what you need, for example
``from l2olib.guards import LGL2O``. Nothing is imported here, so that importing one
small module stays quick.
"""
