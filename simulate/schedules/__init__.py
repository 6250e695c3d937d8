"""Schedules: one file each, listed in ``table.SCHEDULES``."""
