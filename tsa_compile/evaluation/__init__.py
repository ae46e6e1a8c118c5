"""How much accuracy do sparse layers cost, on tasks that need the whole context?

tasks.py        the questions: RULER's families and MQAR, generated
"""
