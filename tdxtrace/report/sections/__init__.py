"""Sections of the report: functions from findings to a Section with sentences, charts, tables."""
